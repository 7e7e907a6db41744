// Strict parsing of Amber's JSONL rows: {"token_ids": [ids], "source": "name"}, one a line.
//
// A line in the layout of Python's json.dumps goes through one of the kernels below, which either understand it wholly or
// say so; every other line goes through the scalar JSON reader, which accepts any valid layout and names the fault of an
// invalid one. A kernel can therefore be fast without knowing errors, and the scalar reader is what it is tested against.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace amber {

// Bytes that may be read, but are not used, after the last line; ids that may be overwritten after the last row.
constexpr std::size_t kSlackBytes = 64;
constexpr std::size_t kSlackIds = 64;

struct Fault {
  std::size_t column = 0;  // counted from 1; 0: none
  std::string reason;
};

struct Format {
  std::size_t row_length;           // ids a row
  std::uint32_t vocab_size;         // ids are below it
  std::vector<std::string> sources;  // a row's code is its source's position
};

// Reads ids separated by ", " from `text` up to the closing bracket.
//
// Returns the address of the bracket if there are exactly `row_length` ids, each below `vocab_size`, of one to five digits
// without leading zeros; nullptr otherwise, with anything in `ids[0 .. row_length + kSlackIds)`. `text` is followed by a
// byte that is no digit, comma or space, and by kSlackBytes after that one; at least 8 bytes lie before it, the last two
// of them no digits.
using IdsKernel = const std::uint8_t* (*)(const std::uint8_t* text, std::size_t row_length, std::uint32_t vocab_size,
                                          std::uint16_t* ids);

const std::uint8_t* ids_portable(const std::uint8_t*, std::size_t, std::uint32_t, std::uint16_t*);
#if defined(__x86_64__)
#define AMBER_X86 1
const std::uint8_t* ids_avx2(const std::uint8_t*, std::size_t, std::uint32_t, std::uint16_t*);
const std::uint8_t* ids_avx512(const std::uint8_t*, std::size_t, std::uint32_t, std::uint16_t*);
#endif

// Any JSON layout; the reference. `begin` to `end` is the line without its newline.
Fault parse_json_line(const std::uint8_t* begin, const std::uint8_t* end, const Format& format, std::uint16_t* ids,
                      std::uint8_t* code);

struct Parsed {
  std::size_t rows = 0;      // written
  std::size_t consumed = 0;  // bytes up to the end of the last line used, or to the start of the bad line
  std::size_t lines = 0;     // used, blank ones included
  Fault fault;               // of the bad line
};

// Reads lines until the text ends, `capacity` rows are written or a line is bad. The last byte of the text is a newline,
// followed by kSlackBytes; `ids` has room for `capacity` rows and kSlackIds more. A null kernel sends every line through
// the scalar reader.
Parsed parse_rows(const std::uint8_t* text, std::size_t size, const Format& format, IdsKernel kernel,
                  std::uint16_t* ids, std::uint8_t* codes, std::size_t capacity);

// Amber's JSONL for `rows` rows, as json.dumps lays it out.
std::string format_rows(const std::uint16_t* ids, const std::uint8_t* codes, std::size_t rows, const Format& format);

struct NamedKernel {
  const char* name;
  IdsKernel kernel;
};

// The kernels that this processor can run, the fastest first; the last one is "scalar" with no kernel.
std::vector<NamedKernel> available_kernels();

}  // namespace amber
