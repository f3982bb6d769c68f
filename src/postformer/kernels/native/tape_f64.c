#define REAL double
#define NAME(x) x##_f64
#include "tiles.h"
#include "tape.h"
