"""What the clients of other systems render: an animation with an include file of its own."""

# Without assumed_gamma, of which POV-Ray warns in words that clients take for an error.
ANIMATION = """#version 3.7;
#include "colours.inc"
#include "part.inc"
camera { location <0, 1, -5> look_at 0 }
light_source { <5, 5, -5>, 1 }
sphere { <clock, 0, 0>, 1 pigment { rgb <frame_number / 20, final_frame / 20, clock_delta> } }
Part(initial_clock, final_clock, initial_frame)
"""
PART = """#macro Part(A, B, C) sphere { <A, B, C> / 3, 0.5 pigment { Mine } } #end
"""
