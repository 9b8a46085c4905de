"""Networks that give every pixel a class: a plain ViT with a pyramid, UPerNet's head, a linear one.

Parameters carry the names of the published weights (`backbone.*`, `decode_head.*`,
`auxiliary_head.*`)."""
