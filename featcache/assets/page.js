"use strict";
// Columns are sorted by buttons, which only a page with a script has: a table is whole without.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    const isText = head.classList.contains("text");
    const value = (row) => {
      const text = row.cells[column].textContent;
      if (isText) return text;
      const number = parseFloat(text.replace(/^[^\d+-]*/, ""));
      return Number.isNaN(number) ? -Infinity : number;
    };
    button.addEventListener("click", () => {
      const isDown = head.getAttribute("aria-sort") === "descending" || (isText && !head.hasAttribute("aria-sort"));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", isDown ? "ascending" : "descending");
      const body = table.tBodies[0];
      const order = new Intl.Collator("en", { numeric: true }).compare;
      const rows = [...body.rows].sort((a, b) => (isText ? order(value(a), value(b)) : value(a) - value(b) || 0));
      body.append(...(isDown ? rows : rows.reverse()));
    });
  });
}
const hover = document.getElementById("hover");
if (hover) {
  const picture = hover.querySelector(".picture");
  const words = hover.querySelector(".words");
  const hide = () => {
    hover.hidden = true;
  };
  for (const map of document.querySelectorAll("svg.map")) {
    map.addEventListener("pointerover", (event) => {
      const dot = event.target.closest("circle");
      if (!dot) return hide();
      const tile = dot.dataset.tile;
      picture.className = tile === undefined ? "picture empty" : `picture t${tile}`;
      words.textContent = dot.querySelector("title").textContent;
      hover.hidden = false;
      const box = dot.getBoundingClientRect();
      const width = hover.offsetWidth;
      hover.style.left = `${Math.max(8, Math.min(box.left + 12, document.documentElement.clientWidth - width - 8)) + scrollX}px`;
      hover.style.top = `${box.bottom + 8 + scrollY}px`;
    });
    map.addEventListener("pointerleave", hide);
  }
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
  });
}
