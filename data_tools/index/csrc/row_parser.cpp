// Lines to rows, and rows to lines.
#include "row_parser.h"

#include <algorithm>
#include <cstring>

namespace amber {
namespace {

constexpr char kPrefix[] = "{\"token_ids\": [";
constexpr char kMiddle[] = "], \"source\": \"";
constexpr char kSuffix[] = "\"}\n";
constexpr std::size_t kPrefixSize = sizeof(kPrefix) - 1;
constexpr std::size_t kMiddleSize = sizeof(kMiddle) - 1;
constexpr std::size_t kSuffixSize = sizeof(kSuffix) - 1;

// The end of a line in json.dumps's layout, newline included; nullptr if it is not wholly that. Comparisons stop at the
// text's last newline, which is in none of the constants but kSuffix, where it is the last byte.
const std::uint8_t* parse_plain_line(const std::uint8_t* line, const Format& format, IdsKernel kernel,
                                     std::uint16_t* ids, std::uint8_t* code) {
  if (std::strncmp(reinterpret_cast<const char*>(line), kPrefix, kPrefixSize) != 0) return nullptr;
  const std::uint8_t* bracket = kernel(line + kPrefixSize, format.row_length, format.vocab_size, ids);
  if (bracket == nullptr) return nullptr;
  const char* at = reinterpret_cast<const char*>(bracket);
  if (std::strncmp(at, kMiddle, kMiddleSize) != 0) return nullptr;
  at += kMiddleSize;
  for (std::size_t i = 0; i < format.sources.size(); ++i) {
    const std::string& name = format.sources[i];
    if (std::strncmp(at, name.c_str(), name.size()) == 0 &&
        std::strncmp(at + name.size(), kSuffix, kSuffixSize) == 0) {
      *code = static_cast<std::uint8_t>(i);
      return reinterpret_cast<const std::uint8_t*>(at) + name.size() + kSuffixSize;
    }
  }
  return nullptr;
}

bool blank(const std::uint8_t* begin, const std::uint8_t* end) {
  while (begin != end && (*begin == ' ' || *begin == '\t' || *begin == '\r')) ++begin;
  return begin == end;
}

}  // namespace

Parsed parse_rows(const std::uint8_t* text, std::size_t size, const Format& format, IdsKernel kernel,
                  std::uint16_t* ids, std::uint8_t* codes, std::size_t capacity) {
  Parsed parsed;
  const std::uint8_t* line = text;
  const std::uint8_t* const end = text + size;
  while (line != end && parsed.rows != capacity) {
    std::uint16_t* row = ids + parsed.rows * format.row_length;
    std::uint8_t* code = codes + parsed.rows;
    const std::uint8_t* next = kernel ? parse_plain_line(line, format, kernel, row, code) : nullptr;
    if (next == nullptr) {
      const auto* newline = static_cast<const std::uint8_t*>(std::memchr(line, '\n', static_cast<std::size_t>(end - line)));
      next = newline + 1;
      if (blank(line, newline)) {
        ++parsed.lines;
        line = next;
        continue;
      }
      parsed.fault = parse_json_line(line, newline, format, row, code);
      if (parsed.fault.column != 0) break;
    }
    ++parsed.rows;
    ++parsed.lines;
    line = next;
  }
  parsed.consumed = static_cast<std::size_t>(line - text);
  return parsed;
}

std::string format_rows(const std::uint16_t* ids, const std::uint8_t* codes, std::size_t rows, const Format& format) {
  struct Piece {
    char text[7];
    std::uint8_t size;
  };
  static const std::vector<Piece> kPieces = [] {
    std::vector<Piece> pieces(1 << 16);
    for (std::size_t id = 0; id < pieces.size(); ++id) {
      const std::string text = std::to_string(id) + ", ";
      std::memcpy(pieces[id].text, text.data(), text.size());
      pieces[id].size = static_cast<std::uint8_t>(text.size());
    }
    return pieces;
  }();
  std::size_t longest_source = 0;
  for (const std::string& source : format.sources) longest_source = std::max(longest_source, source.size());
  const std::size_t longest_line =
      kPrefixSize + format.row_length * sizeof(Piece::text) + kMiddleSize + longest_source + kSuffixSize;
  std::string text(rows * longest_line + sizeof(Piece), '\0');
  char* at = text.data();
  const auto append = [&at](const char* piece, std::size_t size) {
    std::memcpy(at, piece, size);
    at += size;
  };
  for (std::size_t row = 0; row < rows; ++row) {
    append(kPrefix, kPrefixSize);
    for (std::size_t i = 0; i < format.row_length; ++i) {
      const Piece& piece = kPieces[*ids++];
      std::memcpy(at, &piece, sizeof(Piece));  // all of it: a copy of constant size is one instruction
      at += piece.size;
    }
    at -= 2;  // the last ", "
    append(kMiddle, kMiddleSize);
    const std::string& source = format.sources[codes[row]];
    append(source.data(), source.size());
    append(kSuffix, kSuffixSize);
  }
  text.resize(static_cast<std::size_t>(at - text.data()));
  return text;
}

std::vector<NamedKernel> available_kernels() {
  std::vector<NamedKernel> kernels;
#ifdef AMBER_X86
  __builtin_cpu_init();
#ifdef AMBER_AVX512  // emulated
  kernels.push_back({"avx512", ids_avx512});
#else
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2")) {
    kernels.push_back({"avx512", ids_avx512});
  }
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
    kernels.push_back({"avx2", ids_avx2});
  }
#endif
  kernels.push_back({"portable", ids_portable});
  kernels.push_back({"scalar", nullptr});
  return kernels;
}

}  // namespace amber
