// What both vector kernels check on the bit masks of 64 bytes: that ids and ", " take turns, as JSON wants them.
#pragma once

#include <cstdint>

namespace amber {

// Bit i of a mask speaks of byte i of the block.
struct BlockMasks {
  std::uint64_t digits, commas, spaces, zeros;
};

class Separators {
 public:
  // Takes the bytes of a block below `valid` (all of them but in the last block) and adds what is wrong to `faults()`.
  // `ends` are the bytes just after an id: the commas, and in the last block the bracket.
  inline __attribute__((always_inline)) void add(const BlockMasks& masks, std::uint64_t ends, std::uint64_t valid) {
    const std::uint64_t digits = masks.digits & valid;
    const std::uint64_t commas = masks.commas & valid;
    const std::uint64_t spaces = masks.spaces & valid;
    const std::uint64_t starts = (spaces << 1) | start_;  // the byte after a space, and the array's first byte
    const std::uint64_t zero_starts = masks.zeros & starts & valid;
    faults_ |= (spaces ^ ((commas << 1) | comma_)) & valid;        // a space after each comma and nowhere else
    faults_ |= starts & ~digits & valid;                           // an id after each space
    faults_ |= ends & ~((digits << 1) | digit_);                   // and before each comma and the bracket
    faults_ |= digits & ((zero_starts << 1) | zero_start_);        // no digit after a leading zero
    const std::uint64_t runs2 = digits & ((digits << 1) | digit_);  // byte i ends a run of at least 2, 4, 6 digits
    const std::uint64_t runs4 = runs2 & ((runs2 << 2) | (runs2_ >> 62));
    faults_ |= runs4 & ((runs2 << 4) | (runs2_ >> 60));
    start_ = spaces >> 63;
    comma_ = commas >> 63;
    digit_ = digits >> 63;
    zero_start_ = zero_starts >> 63;
    runs2_ = runs2;
  }

  std::uint64_t faults() const { return faults_; }

 private:
  // What the block before leaves behind, in bit 0.
  std::uint64_t start_ = 1;
  std::uint64_t comma_ = 0;
  std::uint64_t digit_ = 0;
  std::uint64_t zero_start_ = 0;
  std::uint64_t runs2_ = 0;
  std::uint64_t faults_ = 0;
};

// The lowest `count` bits, count below 64.
inline std::uint64_t low_bits(unsigned count) { return (std::uint64_t{1} << count) - 1; }

}  // namespace amber
