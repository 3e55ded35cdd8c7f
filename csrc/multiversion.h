// One binary for every x86 machine: the loader picks the version of a function that the processor has. Not for
// templates: GCC has no versions of those.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define BLK_MULTIVERSION __attribute__((flatten, target_clones("avx512f", "fma", "default")))
#else
#define BLK_MULTIVERSION
#endif
