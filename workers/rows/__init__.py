"""Which rows a forward needs, and which of them see which: packs of many canvases without padding."""
