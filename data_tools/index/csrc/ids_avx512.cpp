// AVX-512 with VBMI2: 56 bytes an iteration, seen together with the 8 before them, so that an id never lies in two
// windows: no mask carries into the next, and one permutation of one register fetches the digits of 16 ids.
#include "row_parser.h"

#ifdef AMBER_X86
#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics headers
#endif

#ifndef AMBER_AVX512  // else emulated, for its tests (tests/data_tools/avx512_emulation.h)
#define AMBER_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,lzcnt,popcnt")))
#endif

namespace amber {
namespace {

constexpr unsigned kOld = 8;           // bytes of a window that the one before has dealt with
constexpr unsigned kStep = 64 - kOld;  // and those that are new
constexpr std::uint64_t kNew = ~std::uint64_t{0} << kOld;

// What is wrong with the separators of a window; bits of old bytes mean nothing. Every byte is a digit, comma or space.
inline std::uint64_t faults_of(std::uint64_t commas, std::uint64_t spaces) {
  const std::uint64_t after = commas << 1;
  const std::uint64_t near2 = commas | after;  // at a comma or up to 1, 3, 6 bytes after it
  const std::uint64_t near4 = near2 | (near2 << 2);
  const std::uint64_t near7 = near4 | (near4 << 3);
  return (spaces ^ after)              // a space after each comma and nowhere else
         | (commas & (commas << 2))    // a digit between ", " and the next comma
         | ~near7;                     // and no more than five
}

// Whether a digit follows one of the zeros that begin an id, each of them one byte after a bit of `starts`.
bool leading_zero(const std::uint8_t* window, std::uint64_t starts) {
  for (; starts; starts &= starts - 1) {
    const std::uint8_t next = window[__builtin_ctzll(starts) + 2];
    if (next >= '0' && next <= '9') return true;
  }
  return false;
}

// A constant that stays in a register: GCC broadcasts those of bytes anew in every iteration, on the port of permutations.
AMBER_AVX512 inline __m512i kept(__m512i constant) {
  asm("" : "+m"(constant));
  return constant;
}

// Bytes `first` to `first` + 15, each four times.
AMBER_AVX512 inline __m512i spread(__m512i bytes, int first) {
  const __m512i places = _mm512_set_epi32(0x0F0F0F0F, 0x0E0E0E0E, 0x0D0D0D0D, 0x0C0C0C0C, 0x0B0B0B0B, 0x0A0A0A0A,
                                          0x09090909, 0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404,
                                          0x03030303, 0x02020202, 0x01010101, 0x00000000);
  return _mm512_permutexvar_epi8(_mm512_add_epi8(places, _mm512_set1_epi32(0x01010101 * first)), bytes);
}

// Writes 16 ids, those that end at the places `first` + 1 to `first` + 16, and returns them as 32-bit numbers. `values`
// are the window's digits as 0 to 9, and 0 where there is none. Places before an id's first digit are moved to the comma
// before it; so what follows the last id is 0.
AMBER_AVX512 inline __m512i take_ids(__m512i values, __m512i places, int first, std::uint16_t* ids) {
  const __m512i before = spread(places, first);
  const __m512i ends = spread(places, first + 1);
  const __m512i four_places = _mm512_add_epi8(ends, _mm512_set1_epi32(static_cast<int>(0xFFFEFDFC)));   // -4 to -1
  const __m512i fifth_places = _mm512_add_epi8(ends, _mm512_set1_epi32(static_cast<int>(0xC0C0C0FB)));  // -5; none
  const __m512i digits = _mm512_permutexvar_epi8(_mm512_max_epi8(four_places, before), values);
  const __m512i fifths = _mm512_permutexvar_epi8(_mm512_max_epi8(fifth_places, before), values);
  const __m512i pairs = _mm512_maddubs_epi16(digits, _mm512_set1_epi16(0x010A));   // 10, 1
  const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00010064));  // 100, 1
  const __m512i taken = _mm512_add_epi32(fours, _mm512_madd_epi16(fifths, _mm512_set1_epi32(10000)));
  // The low half of each; vpmovdw would be two operations of the one port for permutations.
  const __m512i low_halves = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x3D3C3938, 0x35343130, 0x2D2C2928, 0x25242120,
                                              0x1D1C1918, 0x15141110, 0x0D0C0908, 0x05040100);
  const __m512i packed = _mm512_permutexvar_epi8(low_halves, taken);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(ids), _mm512_castsi512_si256(packed));
  return taken;
}

}  // namespace

AMBER_AVX512 const std::uint8_t* ids_avx512(const std::uint8_t* text, std::size_t row_length, std::uint32_t vocab_size,
                                            std::uint16_t* ids) {
  const __m512i positions = _mm512_set_epi8(
      63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35,
      34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4,
      3, 2, 1, 0);
  // An unused lane looks at byte 0, which gives no digit: no id of the window's new bytes reaches so far back.
  const __m512i zero = kept(_mm512_mask_set1_epi8(_mm512_set1_epi8('0'), 1, 0x50));
  const __m512i ten = kept(_mm512_set1_epi8(10));
  const __m512i comma = kept(_mm512_set1_epi8(','));
  const __m512i space = kept(_mm512_set1_epi8(' '));
  __m512i highest = _mm512_setzero_si512();
  std::uint64_t faults = 0;
  std::size_t count = 0;
  const std::uint8_t* window = text - kOld;
  // The array begins like an id after "000000, ".
  __m512i bytes = _mm512_mask_loadu_epi8(_mm512_set1_epi64(0x202C303030303030), kNew, window);
  for (;;) {
    const __m512i offsets = _mm512_sub_epi8(bytes, zero);
    const std::uint64_t digits = _mm512_cmplt_epu8_mask(offsets, ten);
    const __m512i values = _mm512_maskz_mov_epi8(digits, offsets);
    std::uint64_t commas = _mm512_cmpeq_epi8_mask(bytes, comma);
    const std::uint64_t spaces = _mm512_cmpeq_epi8_mask(bytes, space);
    std::uint64_t zero_starts = _mm512_mask_cmpeq_epi8_mask(spaces, _mm512_loadu_si512(window + 1), zero);
    const std::uint64_t others = ~(digits | commas | spaces) & kNew;
    if (others == 0) {
      faults |= faults_of(commas, spaces);
    } else {  // the array's last byte ends an id as a comma does
      const std::uint64_t used = others ^ (others - 1);
      zero_starts &= used;
      commas = (commas & used) | (others & used);
      faults |= faults_of(commas, spaces) & used;
    }
    if (zero_starts && leading_zero(window, zero_starts)) return nullptr;
    const std::uint64_t ends = commas & kNew;
    const std::size_t found = static_cast<std::size_t>(_mm_popcnt_u64(ends));  // at most 19 with sound separators
    if (count + found > row_length) return nullptr;
    // The last comma of the old bytes comes first: where the window's first id begins.
    const std::uint64_t before = (std::uint64_t{1} << 63) >> _lzcnt_u64((commas & ~kNew) | 1);
    const __m512i places = _mm512_maskz_compress_epi8(ends | before, positions);
    highest = _mm512_max_epu32(highest, take_ids(values, places, 0, ids + count));
    if (found > 16) highest = _mm512_max_epu32(highest, take_ids(values, places, 16, ids + count + 16));
    count += found;
    if (others) {
      text = window + _tzcnt_u64(others);
      break;
    }
    window += kStep;
    bytes = _mm512_loadu_si512(window);
  }
  const bool sound = (faults & kNew) == 0 && *text == ']' && count == row_length;
  return sound && _mm512_reduce_max_epu32(highest) < vocab_size ? text : nullptr;
}

}  // namespace amber
#endif
