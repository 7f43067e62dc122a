from .reference_heads import decode_, steer_heads_
