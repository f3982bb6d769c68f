#define REAL float
#define IS_FLOAT
#define NAME(x) x##_f32
#include "tiles.h"
#include "tape.h"
