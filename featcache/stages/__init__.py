"""The stages: extract, fit, finetune. They never import each other; ``pipeline`` joins them."""
