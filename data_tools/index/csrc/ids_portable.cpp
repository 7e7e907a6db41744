// Eight bytes at a time in a general register: one id an iteration.
#include <cstring>

#include "row_parser.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the token files are little-endian, and so must be the machine that builds them"
#endif

namespace amber {

const std::uint8_t* ids_portable(const std::uint8_t* text, std::size_t row_length, std::uint32_t vocab_size,
                                 std::uint16_t* ids) {
  constexpr std::uint64_t kZeros = 0x3030303030303030;
  for (std::size_t i = 0; i < row_length; ++i) {
    std::uint64_t bytes;
    std::memcpy(&bytes, text, sizeof(bytes));
    const std::uint64_t values = bytes ^ kZeros;  // 0 to 9 where the byte is a digit
    // The lowest byte above 9 gets its high bit set; carries go upwards only, so the lowest set bit is right.
    const std::uint64_t others = (values | (values + 0x7676767676767676)) & 0x8080808080808080;
    if (others == 0) return nullptr;
    const unsigned size = static_cast<unsigned>(__builtin_ctzll(others)) / 8;
    if (size == 0 || size > 5 || (size > 1 && (values & 0xFF) == 0)) return nullptr;
    std::uint64_t digits = values << (64 - 8 * size);  // the last digit in the highest byte, zeros before the first
    digits = (digits * 10 + (digits >> 8)) & 0x00FF00FF00FF00FF;
    digits = (digits * 100 + (digits >> 16)) & 0x0000FFFF0000FFFF;
    const std::uint64_t id = ((digits * 10000 + (digits >> 32))) & 0xFFFFFFFF;
    if (id >= vocab_size) return nullptr;
    ids[i] = static_cast<std::uint16_t>(id);
    const std::uint64_t separator = (bytes >> (8 * size)) & 0xFFFF;
    text += size;
    if (i + 1 == row_length) return *text == ']' ? text : nullptr;
    if (separator != 0x202C) return nullptr;  // ", "
    text += 2;
  }
  return nullptr;
}

}  // namespace amber
