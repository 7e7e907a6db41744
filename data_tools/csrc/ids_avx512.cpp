// AVX-512 with VBMI2: 64 bytes an iteration; the positions of the separators are compressed into one register, and the
// digits before each are fetched from the block and the one before by two permutations.
#include "row_parser.h"

#ifdef AMBER_X86
#include <immintrin.h>

#include "separators.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own intrinsics headers
#endif

#define AMBER_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,lzcnt,popcnt")))

namespace amber {
namespace {

// Digits of two blocks as values 0 to 9, in table order: byte 64 + i is byte i of the current block.
struct Table {
  __m512i before, current;
};

// 16 ids that end at the byte positions `ends` of the current block and have `sizes` digits. Lanes that are not in use
// give anything.
AMBER_AVX512 inline __m512i ids_ending_at(const Table& table, __m128i ends, __m128i sizes) {
  // Each position four times; slot byte k holds the digit 4 - k places before the end.
  const __m512i spread = _mm512_set_epi32(0x0F0F0F0F, 0x0E0E0E0E, 0x0D0D0D0D, 0x0C0C0C0C, 0x0B0B0B0B, 0x0A0A0A0A,
                                          0x09090909, 0x08080808, 0x07070707, 0x06060606, 0x05050505, 0x04040404,
                                          0x03030303, 0x02020202, 0x01010101, 0x00000000);
  const __m512i slot_ends = _mm512_permutexvar_epi8(spread, _mm512_castsi128_si512(ends));
  const __m512i slot_sizes = _mm512_permutexvar_epi8(spread, _mm512_castsi128_si512(sizes));
  const __m512i places = _mm512_add_epi8(slot_ends, _mm512_set1_epi32(0x3F3E3D3C));  // 64 - 4, ..., 64 - 1
  const __mmask64 used = _mm512_cmpge_epu8_mask(slot_sizes, _mm512_set1_epi32(0x01020304));
  const __m512i digits = _mm512_maskz_permutex2var_epi8(used, table.before, places, table.current);
  const __m512i pairs = _mm512_maddubs_epi16(digits, _mm512_set1_epi16(0x010A));   // 10, 1
  const __m512i fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00010064));  // 100, 1
  const __m512i fifth_places = _mm512_castsi128_si512(_mm_add_epi8(ends, _mm_set1_epi8(64 - 5)));
  const __mmask64 has_fifth = _mm_cmpeq_epi8_mask(sizes, _mm_set1_epi8(5));
  const __m512i fifths = _mm512_maskz_permutex2var_epi8(has_fifth, table.before, fifth_places, table.current);
  const __m512i fifth = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(fifths));
  return _mm512_add_epi32(fours, _mm512_madd_epi16(fifth, _mm512_set1_epi32(10000)));
}

}  // namespace

AMBER_AVX512 const std::uint8_t* ids_avx512(const std::uint8_t* text, std::size_t row_length, std::uint32_t vocab_size,
                                            std::uint16_t* ids) {
  const __m512i positions = _mm512_set_epi8(
      63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36, 35,
      34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4,
      3, 2, 1, 0);
  const __m512i zero = _mm512_set1_epi8('0');
  const __m128i two = _mm_set1_epi8(2);
  Table table{_mm512_setzero_si512(), _mm512_setzero_si512()};
  Separators separators;
  __m512i highest = _mm512_setzero_si512();
  std::size_t count = 0;
  // Where the separator before the block's first id begins, seen from the block; the array begins like an id after ", ".
  __m128i last_end = _mm_set1_epi8(-2);
  for (;; text += 64) {
    const __m512i block = _mm512_loadu_si512(text);
    table.current = _mm512_sub_epi8(block, zero);
    const BlockMasks masks{
        _mm512_cmplt_epu8_mask(table.current, _mm512_set1_epi8(10)),
        _mm512_cmpeq_epi8_mask(block, _mm512_set1_epi8(',')),
        _mm512_cmpeq_epi8_mask(block, _mm512_set1_epi8(' ')),
        _mm512_cmpeq_epi8_mask(block, zero),
    };
    const std::uint64_t others = ~(masks.digits | masks.commas | masks.spaces);
    const unsigned end = others ? static_cast<unsigned>(_tzcnt_u64(others)) : 64;
    const std::uint64_t valid = others ? low_bits(end) : ~std::uint64_t{0};
    const std::uint64_t ends = others ? (masks.commas & valid) | (std::uint64_t{1} << end) : masks.commas;
    separators.add(masks, ends, valid);
    // With sound separators a block has at most 22 ids and at least 9.
    const unsigned found = static_cast<unsigned>(_mm_popcnt_u64(ends));
    if (separators.faults() || count + found > row_length) return nullptr;
    const __m512i compressed = _mm512_maskz_compress_epi8(ends, positions);
    const __m128i first_ends = _mm512_castsi512_si128(compressed);
    const __m128i first_sizes = _mm_sub_epi8(_mm_sub_epi8(first_ends, _mm_alignr_epi8(first_ends, last_end, 15)), two);
    const __m512i first = ids_ending_at(table, first_ends, first_sizes);
    highest = _mm512_mask_max_epu32(highest, static_cast<__mmask16>(_bzhi_u32(0xFFFF, found)), highest, first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ids + count), _mm512_cvtepi32_epi16(first));
    if (found > 16) {
      const __m128i more_ends = _mm512_extracti32x4_epi32(compressed, 1);
      const __m128i more_sizes = _mm_sub_epi8(_mm_sub_epi8(more_ends, _mm_alignr_epi8(more_ends, first_ends, 15)), two);
      const __m512i more = ids_ending_at(table, more_ends, more_sizes);
      highest = _mm512_mask_max_epu32(highest, static_cast<__mmask16>(_bzhi_u32(0xFFFF, found - 16)), highest, more);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(ids + count + 16), _mm512_cvtepi32_epi16(more));
    }
    count += found;
    if (others) {
      text += end;
      break;
    }
    table.before = table.current;
    last_end = _mm_set1_epi8(static_cast<char>(-1 - static_cast<int>(_lzcnt_u64(ends))));
  }
  return *text == ']' && count == row_length && _mm512_reduce_max_epu32(highest) < vocab_size ? text : nullptr;
}

}  // namespace amber
#endif
