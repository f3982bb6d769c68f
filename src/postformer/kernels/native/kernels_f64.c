#define REAL double
#define NAME(x) x##_f64
#include "tiles.h"
#include "gdr.h"
#include "rows.h"
#include "conv.h"
#include "scan.h"
