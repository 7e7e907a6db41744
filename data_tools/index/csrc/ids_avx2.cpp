// AVX2, in two passes: the eight bytes before each separator go to slots in L1, then slots become ids, 16 at a time.
#include "row_parser.h"

#ifdef AMBER_X86
#include <immintrin.h>

#include <cstring>

#include "separators.h"

#define AMBER_AVX2 __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt")))

namespace amber {
namespace {

constexpr std::size_t kBatch = 16;
constexpr std::size_t kUsual = 12;  // ids that end in a block of 64 bytes: Amber's have 6 bytes on the average
constexpr std::size_t kMost = 22;   // and at most, with sound separators

AMBER_AVX2 inline std::uint64_t mask_of(__m256i low, __m256i high) {
  return static_cast<std::uint32_t>(_mm256_movemask_epi8(low)) |
         (static_cast<std::uint64_t>(static_cast<std::uint32_t>(_mm256_movemask_epi8(high))) << 32);
}

AMBER_AVX2 inline BlockMasks masks_of(const std::uint8_t* text) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text + 32));
  const __m256i zero = _mm256_set1_epi8('0');
  const __m256i nine = _mm256_set1_epi8(9);
  const __m256i comma = _mm256_set1_epi8(',');
  const __m256i space = _mm256_set1_epi8(' ');
  const __m256i low_value = _mm256_sub_epi8(low, zero);
  const __m256i high_value = _mm256_sub_epi8(high, zero);
  return {
      mask_of(_mm256_cmpeq_epi8(_mm256_min_epu8(low_value, nine), low_value),
              _mm256_cmpeq_epi8(_mm256_min_epu8(high_value, nine), high_value)),
      mask_of(_mm256_cmpeq_epi8(low, comma), _mm256_cmpeq_epi8(high, comma)),
      mask_of(_mm256_cmpeq_epi8(low, space), _mm256_cmpeq_epi8(high, space)),
      mask_of(_mm256_cmpeq_epi8(low, zero), _mm256_cmpeq_epi8(high, zero)),
  };
}

// Puts the eight bytes before each of `ends` into the slots from `count` on; returns the count after them.
AMBER_AVX2 inline std::size_t store_slots(std::uint64_t* slots, std::size_t count, const std::uint8_t* text,
                                          std::uint64_t ends) {
  const std::size_t found = static_cast<std::size_t>(_mm_popcnt_u64(ends));
  // Nearly every block has at most kUsual ids: without a loop there is no branch to guess wrong. Slots beyond the last
  // id hold anything, and are written again for the next block.
  for (std::size_t i = 0; i < kUsual; ++i, ends = _blsr_u64(ends)) {
    std::memcpy(&slots[count + i], text + _tzcnt_u64(ends) - 8, 8);
  }
  if (found > kUsual) {
    for (std::size_t i = kUsual; i < kMost; ++i, ends = _blsr_u64(ends)) {
      std::memcpy(&slots[count + i], text + _tzcnt_u64(ends) - 8, 8);
    }
  }
  return count + found;
}

// Four slots to four pairs of 32-bit numbers: digits 1 to 4 and digits 5 to 8 of the eight.
AMBER_AVX2 inline __m256i halves_of(const std::uint64_t* slots) {
  const __m256i values = _mm256_sub_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(slots)), _mm256_set1_epi8('0'));
  // Bytes up to the last one that is no digit belong to the id before: spread "no digit" towards the lower bytes. Two
  // such bytes at least stand before each id, so the first step can be two bytes wide.
  __m256i other = _mm256_cmpeq_epi8(_mm256_max_epu8(values, _mm256_set1_epi8(10)), values);
  other = _mm256_or_si256(other, _mm256_srli_epi64(other, 16));
  other = _mm256_or_si256(other, _mm256_srli_epi64(other, 32));
  const __m256i digits = _mm256_andnot_si256(other, values);
  const __m256i pairs = _mm256_maddubs_epi16(digits, _mm256_set1_epi16(0x010A));  // 10, 1
  return _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00010064));                 // 100, 1
}

// The ids of `count` slots (a multiple of kBatch); returns whether all are below the vocabulary size.
AMBER_AVX2 bool convert(const std::uint64_t* slots, std::size_t count, std::uint32_t vocab_size, std::uint16_t* ids) {
  const __m256i weights = _mm256_set1_epi32(0x00012710);  // 10000, 1
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i highest = _mm256_setzero_si256();
  for (std::size_t i = 0; i < count; i += kBatch) {
    const __m256i first = _mm256_packus_epi32(halves_of(slots + i), halves_of(slots + i + 4));
    const __m256i second = _mm256_packus_epi32(halves_of(slots + i + 8), halves_of(slots + i + 12));
    const __m256i first_ids = _mm256_madd_epi16(first, weights);
    const __m256i second_ids = _mm256_madd_epi16(second, weights);
    highest = _mm256_max_epu32(highest, _mm256_max_epu32(first_ids, second_ids));
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi32(first_ids, second_ids), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(ids + i), packed);
  }
  const __m256i limit = _mm256_set1_epi32(static_cast<int>(vocab_size - 1));
  const __m256i within = _mm256_cmpeq_epi32(_mm256_max_epu32(highest, limit), limit);
  return _mm256_movemask_epi8(within) == -1;
}

}  // namespace

AMBER_AVX2 const std::uint8_t* ids_avx2(const std::uint8_t* text, std::size_t row_length, std::uint32_t vocab_size,
                                        std::uint16_t* ids) {
  thread_local std::vector<std::uint64_t> storage;
  if (storage.size() < row_length + 64 + kBatch) storage.resize(row_length + 64 + kBatch);
  std::uint64_t* const slots = storage.data();
  std::size_t count = 0;
  Separators separators;
  for (;; text += 64) {
    const BlockMasks masks = masks_of(text);
    const std::uint64_t others = ~(masks.digits | masks.commas | masks.spaces);
    if (others == 0) {
      separators.add(masks, masks.commas, ~std::uint64_t{0});
      count = store_slots(slots, count, text, masks.commas);
      if (separators.faults() || count > row_length) return nullptr;
    } else {
      const unsigned end = static_cast<unsigned>(_tzcnt_u64(others));
      const std::uint64_t ends = (masks.commas & low_bits(end)) | (std::uint64_t{1} << end);
      separators.add(masks, ends, low_bits(end));
      count = store_slots(slots, count, text, ends);
      text += end;
      break;
    }
  }
  if (separators.faults() || *text != ']' || count != row_length) return nullptr;
  // The last batch is filled up with ids 0.
  for (std::size_t i = count; i % kBatch; ++i) slots[i] = 0x3030303030303030;
  return convert(slots, (count + kBatch - 1) / kBatch * kBatch, vocab_size, ids) ? text : nullptr;
}

}  // namespace amber
#endif
