// For `make emulate`: the AVX-512 kernel on a processor without AVX-512. SIMDe emulates the intrinsics; those that its
// packaged version lacks stand here, each as Intel's Intrinsics Guide defines it.
#pragma once

#include <cstdint>
#include <cstring>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#define AMBER_AVX512  // no attribute: this is no AVX-512 code

#undef _mm512_madd_epi16  // 0.7.4 gives it the arguments of _mm512_mask_madd_epi16
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_maskz_compress_epi8 emulated_maskz_compress_epi8
#define _mm512_mask_loadu_epi8 emulated_mask_loadu_epi8
#define _mm512_reduce_max_epu32 emulated_reduce_max_epu32

template <typename Lane>
struct Lanes {
  Lane lane[64 / sizeof(Lane)];
  explicit Lanes(simde__m512i vector) { std::memcpy(lane, &vector, 64); }
  operator simde__m512i() const {
    simde__m512i vector;
    std::memcpy(&vector, lane, 64);
    return vector;
  }
};

inline simde__m512i emulated_maskz_compress_epi8(std::uint64_t mask, simde__m512i from) {
  const Lanes<std::uint8_t> source(from);
  Lanes<std::uint8_t> target(simde_mm512_setzero_si512());
  for (int i = 0, at = 0; i < 64; ++i) {
    if (mask >> i & 1) target.lane[at++] = source.lane[i];
  }
  return target;
}

inline simde__m512i emulated_mask_loadu_epi8(simde__m512i otherwise, std::uint64_t mask, const void* from) {
  Lanes<std::uint8_t> target(otherwise);
  for (int i = 0; i < 64; ++i) {  // bytes that the mask leaves out are not read
    if (mask >> i & 1) target.lane[i] = static_cast<const std::uint8_t*>(from)[i];
  }
  return target;
}

inline std::uint32_t emulated_reduce_max_epu32(simde__m512i vector) {
  std::uint32_t highest = 0;
  for (const std::uint32_t lane : Lanes<std::uint32_t>(vector).lane) highest = lane > highest ? lane : highest;
  return highest;
}
