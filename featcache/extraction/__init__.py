"""From images to cached rows: what is there already, and one pass over what is not."""
