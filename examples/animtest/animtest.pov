// animtest.pov: eight marbles, eight straight lines, one rolling circle.
//
// Each marble only rolls to and fro on its own straight track. Seen together,
// the eight of them always lie on one circle, half as wide as the board, which
// rolls around inside it. (Nasir al-Din al-Tusi described this in 1247: it is
// called the Tusi couple.) Where the circle touches the rim, the pins rise.
//
// Every position below is computed from `clock` alone. No frame needs another
// one, so the frames can be rendered in any order and on any machine.

#version 3.7;
global_settings { assumed_gamma 1.0 max_trace_level 4 }
#default { finish { ambient 0 } }   // light comes from lamps only

// --- Numbers to play with ----------------------------------------------------

#declare Marbles = 8;
#declare MarbleR = 0.50;    // radius of a marble
#declare Reach   = 3.55;    // how far from the middle a marble goes
#declare TrackH  = 0.012;   // how far the brass stands out of the wood
#declare BoardR  = 5.00;
#declare Pins    = 48;
#declare PinRing = 4.58;    // the pins stand on a circle of this radius

#declare Turn = 360*clock;  // degrees: where the rolling circle touches the rim

// Our own include files use the numbers above, so they come after them.
#include "marble.inc"
#include "board.inc"

// --- The board and what moves on it ------------------------------------------

object { Board }

#declare Deep = array[Marbles] {
  srgb <0.55, 0.05, 0.08>, srgb <0.66, 0.20, 0.03>,   // red, orange
  srgb <0.62, 0.38, 0.03>, srgb <0.10, 0.34, 0.16>,   // yellow, green
  srgb <0.02, 0.30, 0.36>, srgb <0.04, 0.14, 0.46>,   // teal, blue
  srgb <0.20, 0.08, 0.44>, srgb <0.44, 0.04, 0.34>    // violet, magenta
}
#declare Bright = array[Marbles] {
  srgb <0.95, 0.30, 0.26>, srgb <0.98, 0.52, 0.16>,
  srgb <0.98, 0.76, 0.24>, srgb <0.38, 0.70, 0.36>,
  srgb <0.16, 0.66, 0.70>, srgb <0.24, 0.48, 0.90>,
  srgb <0.54, 0.36, 0.88>, srgb <0.88, 0.32, 0.66>
}

#for (I, 0, Marbles - 1)
  #local Angle = 180*I/Marbles;                        // direction of the track
  #local Place = Reach*cos(radians(Turn - Angle));     // place on the track
  object {
    Marble(Deep[I], Bright[I])
    rotate <40*I, 135*I, 0>                  // each shows another side of the swirl
    rotate -z*degrees(Place/MarbleR)         // roll without slipping: angle = way / radius
    translate <Place, MarbleR + TrackH, 0>
    rotate -y*Angle
  }
#end

#for (I, 0, Pins - 1)
  #local Angle = 360*I/Pins;
  // A smooth hump: 1 where Angle = Turn and almost 0 elsewhere. The power makes
  // it narrow. A cosine has no corners, so nothing starts or stops with a jerk.
  #local Lift = pow(0.5 + 0.5*cos(radians(Angle - Turn)), 10);
  object { Pin(Lift) translate PinRing*x rotate -y*Angle }
#end

// --- Around it ---------------------------------------------------------------

plane {
  y, -0.8
  pigment { srgb <0.20, 0.38, 0.42> }
  finish { diffuse 0.9 emission 0.02 }
}

sky_sphere {   // seen only as a reflection in the glass
  pigment {
    gradient y
    color_map {
      [0.0 srgb <0.35, 0.38, 0.40>]
      [0.3 srgb <0.18, 0.26, 0.34>]
      [1.0 srgb <0.06, 0.08, 0.14>]
    }
  }
}

// A window in two halves, for the highlights on the marbles. It throws no
// shadow, and the camera sees it in reflections only (no_image).
union {
  box { <-2.2, 0, -2.2>, <-0.15, 0.01, 2.2> }
  box { < 0.15, 0, -2.2>, < 2.2, 0.01, 2.2> }
  pigment { rgb <1.0, 0.93, 0.82>*12 }
  finish { emission 1 diffuse 0 }
  no_shadow no_image
  rotate -30*x
  translate <-4, 13, 5>
}

// --- Light -------------------------------------------------------------------

// The warm lamp. As an area_light it has a size, which makes shadows soft;
// `adaptive 0` spends its 5 x 5 samples only at the edges of shadows.
light_source {
  <-9, 16, 6> rgb <1.00, 0.88, 0.72>*1.5
  area_light 2*x, 2*z, 5, 5 adaptive 0 circular orient
  spotlight point_at <-1, 0, 1.5> radius 6 falloff 42
}
// Cool light from the other side, so that shadows are blue and not black.
light_source { <8, 10, -12> rgb <0.30, 0.38, 0.50>*0.8 shadowless }
// The glow of the raised pearls: a small lamp that goes around with them.
light_source {
  <PinRing, 1.4, 0> rgb <1.00, 0.62, 0.25>*3
  fade_distance 0.8 fade_power 2
  shadowless
  rotate -y*Turn
}

// --- Camera ------------------------------------------------------------------

// It sways by 8 degrees to either side, and is back where it was when clock = 1.
camera {
  location vrotate(<0, 9.5, -13>, 8*sin(radians(Turn))*y)
  look_at <0, -0.35, -0.55>
  right x*image_width/image_height
  angle 47.5
}
