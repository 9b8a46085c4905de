"""How good detections are, by COCO's rules, and what a person sees of them."""
