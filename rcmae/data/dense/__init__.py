"""Images with a target for each place: maps of classes, boxes and masks, seen together."""
