#include "combine_launch.cuh"
