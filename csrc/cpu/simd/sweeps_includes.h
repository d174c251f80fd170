// What the sweeps need, included before any target is chosen, so that inline functions of these
// headers are compiled for every processor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "sweeps.h"
