// The scalar reader: every layout that JSON allows, and a place and reason for what it does not.
#include <cstring>

#include "row_parser.h"

namespace amber {
namespace {

constexpr std::size_t kLongestName = 32;  // longer strings match no key and no source

class Reader {
 public:
  Reader(const std::uint8_t* begin, const std::uint8_t* end, const Format& format)
      : begin_(begin), at_(begin), end_(end), format_(format) {}

  Fault read(std::uint16_t* ids, std::uint8_t* code) {
    bool has_ids = false;
    bool has_source = false;
    if (end_ - at_ >= 3 && std::memcmp(at_, "\xEF\xBB\xBF", 3) == 0) return fault("a byte order mark (save it as UTF-8 without)");
    space();
    if (!take('{')) return expected("'{'");
    do {
      space();
      const std::uint8_t* key_at = at_;
      std::string key;
      if (!string(&key)) return fault_;
      space();
      if (!take(':')) return expected("':'");
      space();
      if (key == "token_ids" && !has_ids) {
        has_ids = true;
        if (!array(ids)) return fault_;
      } else if (key == "source" && !has_source) {
        has_source = true;
        if (!source(code)) return fault_;
      } else {
        at_ = key_at;
        return fault(key == "token_ids" || key == "source" ? "a key stands twice" : "a key other than token_ids and source");
      }
      space();
    } while (take(','));
    if (!take('}')) return expected("',' or '}'");
    space();
    if (at_ != end_) return fault("something after the closing '}'");
    if (!has_ids) return fault("no key token_ids");
    if (!has_source) return fault("no key source");
    return {};
  }

 private:
  void space() {
    while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
  }

  bool take(char wanted) {
    if (at_ == end_ || *at_ != static_cast<std::uint8_t>(wanted)) return false;
    ++at_;
    return true;
  }

  Fault fault(std::string reason) {
    fault_ = {static_cast<std::size_t>(at_ - begin_) + 1, std::move(reason)};
    return fault_;
  }

  Fault expected(const char* what) {
    return fault(std::string("expected ") + what + (at_ == end_ ? ", but the line ends" : ""));
  }

  static bool digit(std::uint8_t byte) { return byte >= '0' && byte <= '9'; }

  // Leaves a string in `text`; cut to kLongestName, and with a byte that matches nothing for characters beyond ASCII.
  bool string(std::string* text) {
    if (!take('"')) return expected("'\"'"), false;
    while (at_ != end_ && *at_ != '"') {
      std::uint8_t byte = *at_;
      if (byte < 0x20) return fault("a control character in a string"), false;
      if (byte == '\\' && !escape(&byte)) return false;
      ++at_;
      if (text->size() < kLongestName) text->push_back(static_cast<char>(byte));
    }
    if (!take('"')) return expected("'\"'"), false;
    return true;
  }

  // Leaves `at_` on the last byte of the escape.
  bool escape(std::uint8_t* byte) {
    static const char kNames[] = "\"\\/bfnrt";
    static const char kValues[] = "\"\\/\b\f\n\r\t";
    ++at_;
    if (at_ == end_) return expected("an escape"), false;
    if (const char* name = static_cast<const char*>(std::memchr(kNames, *at_, sizeof(kNames) - 1))) {
      *byte = static_cast<std::uint8_t>(kValues[name - kNames]);
      return true;
    }
    if (*at_ != 'u') return fault("an unknown escape"), false;
    unsigned value = 0;
    for (int i = 0; i < 4; ++i) {
      ++at_;
      if (at_ == end_) return expected("four hexadecimal digits"), false;
      const std::uint8_t lower = *at_ | 0x20;
      if (digit(*at_)) {
        value = value * 16 + (*at_ - '0');
      } else if (lower >= 'a' && lower <= 'f') {
        value = value * 16 + (lower - 'a' + 10);
      } else {
        return fault("expected four hexadecimal digits"), false;
      }
    }
    *byte = value < 0x80 ? static_cast<std::uint8_t>(value) : 0xFF;
    return true;
  }

  bool array(std::uint16_t* ids) {
    if (!take('[')) return expected("'['"), false;
    std::size_t count = 0;
    space();
    if (!take(']')) {
      do {
        space();
        std::uint32_t id = 0;
        if (!integer(&id)) return false;
        if (count < format_.row_length) ids[count] = static_cast<std::uint16_t>(id);
        ++count;
        space();
      } while (take(','));
      if (!take(']')) return expected("',' or ']'"), false;
    }
    if (count == format_.row_length) return true;
    --at_;
    return fault(std::to_string(count) + " ids, expected " + std::to_string(format_.row_length)), false;
  }

  bool integer(std::uint32_t* value) {
    const std::uint8_t* start = at_;
    std::uint64_t number = 0;
    while (at_ != end_ && digit(*at_)) {
      if (number <= format_.vocab_size) number = number * 10 + (*at_ - '0');
      ++at_;
    }
    if (at_ == start) return expected("an id (an integer without sign)"), false;
    if (at_ != end_ && (*at_ == '.' || *at_ == 'e' || *at_ == 'E')) return fault("an id is not an integer"), false;
    const bool leading_zero = *start == '0' && at_ - start > 1;
    if (!leading_zero && number < format_.vocab_size) {
      *value = static_cast<std::uint32_t>(number);
      return true;
    }
    at_ = start;
    return fault(leading_zero ? "a number with a leading zero"
                              : "an id that is not below " + std::to_string(format_.vocab_size)),
           false;
  }

  bool source(std::uint8_t* code) {
    const std::uint8_t* start = at_;
    std::string name;
    if (!string(&name)) return false;
    for (std::size_t i = 0; i < format_.sources.size(); ++i) {
      if (name == format_.sources[i]) {
        *code = static_cast<std::uint8_t>(i);
        return true;
      }
    }
    at_ = start;
    return fault("an unknown source"), false;
  }

  const std::uint8_t* begin_;
  const std::uint8_t* at_;
  const std::uint8_t* end_;
  const Format& format_;
  Fault fault_;
};

}  // namespace

Fault parse_json_line(const std::uint8_t* begin, const std::uint8_t* end, const Format& format, std::uint16_t* ids,
                      std::uint8_t* code) {
  return Reader(begin, end, format).read(ids, code);
}

}  // namespace amber
