#include "gram_launch.cuh"
