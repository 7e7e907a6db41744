// The Python face of the core: buffers in, buffers filled, the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "row_parser.h"

namespace py = pybind11;

namespace {

amber::IdsKernel kernel_named(const std::string& name) {
  const std::vector<amber::NamedKernel> kernels = amber::available_kernels();
  if (name.empty()) return kernels.front().kernel;
  for (const amber::NamedKernel& kernel : kernels) {
    if (name == kernel.name) return kernel.kernel;
  }
  throw std::invalid_argument("this processor has no kernel " + name);
}

amber::Format checked_format(std::size_t row_length, std::uint32_t vocab_size, std::vector<std::string> sources) {
  if (row_length == 0) throw std::invalid_argument("row_length must be positive");
  if (vocab_size == 0 || vocab_size > 65536) throw std::invalid_argument("vocab_size must lie in 1 to 65536");
  if (sources.empty() || sources.size() > 256) throw std::invalid_argument("between 1 and 256 sources, please");
  return {row_length, vocab_size, std::move(sources)};
}

// The address and the size in bytes of a contiguous buffer.
std::pair<std::uint8_t*, std::size_t> bytes_of(const py::buffer_info& info) {
  py::ssize_t expected = info.itemsize;
  for (py::ssize_t i = info.ndim; i-- > 0;) {
    if (info.shape[static_cast<std::size_t>(i)] > 1 && info.strides[static_cast<std::size_t>(i)] != expected) {
      throw std::invalid_argument("the buffer is not contiguous");
    }
    expected *= info.shape[static_cast<std::size_t>(i)];
  }
  return {static_cast<std::uint8_t*>(info.ptr), static_cast<std::size_t>(info.size * info.itemsize)};
}

class RowParser {
 public:
  RowParser(std::size_t row_length, std::uint32_t vocab_size, std::vector<std::string> sources, const std::string& kernel)
      : format_(checked_format(row_length, vocab_size, std::move(sources))), kernel_(kernel_named(kernel)) {}

  py::tuple parse(const py::buffer& text, std::size_t start, std::size_t stop, const py::buffer& ids,
                  const py::buffer& codes) const {
    const py::buffer_info text_info = text.request();
    const py::buffer_info ids_info = ids.request(true);
    const py::buffer_info codes_info = codes.request(true);
    const auto [text_at, text_size] = bytes_of(text_info);
    const auto [ids_at, ids_size] = bytes_of(ids_info);
    const auto [codes_at, capacity] = bytes_of(codes_info);
    if (start >= stop || stop > text_size || text_size - stop < amber::kSlackBytes || text_at[stop - 1] != '\n') {
      throw std::invalid_argument("the text must end with a newline, with slack bytes behind it");
    }
    if (ids_size / sizeof(std::uint16_t) < capacity * format_.row_length + amber::kSlackIds) {
      throw std::invalid_argument("the ids have no room for a row a code and the slack");
    }
    amber::Parsed parsed;
    {
      py::gil_scoped_release release;
      parsed = amber::parse_rows(text_at + start, stop - start, format_, kernel_,
                                 reinterpret_cast<std::uint16_t*>(ids_at), codes_at, capacity);
    }
    return py::make_tuple(parsed.rows, parsed.consumed, parsed.lines, parsed.fault.column, parsed.fault.reason);
  }

  py::bytes format(const py::buffer& ids, const py::buffer& codes) const {
    const py::buffer_info ids_info = ids.request();
    const py::buffer_info codes_info = codes.request();
    const auto [ids_at, ids_size] = bytes_of(ids_info);
    const auto [codes_at, rows] = bytes_of(codes_info);
    if (ids_size != rows * format_.row_length * sizeof(std::uint16_t)) {
      throw std::invalid_argument("as many rows of ids as codes, please");
    }
    for (std::size_t row = 0; row < rows; ++row) {
      if (codes_at[row] >= format_.sources.size()) throw std::invalid_argument("a code that is no source");
    }
    std::string text;
    {
      py::gil_scoped_release release;
      text = amber::format_rows(reinterpret_cast<const std::uint16_t*>(ids_at), codes_at, rows, format_);
    }
    return py::bytes(text);
  }

 private:
  amber::Format format_;
  amber::IdsKernel kernel_;
};

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Amber's JSONL rows to uint16 ids and back (data_tools/index/csrc).";
  module.attr("SLACK_BYTES") = amber::kSlackBytes;
  module.attr("SLACK_IDS") = amber::kSlackIds;
  module.def("kernels", [] {
    std::vector<std::string> names;
    for (const amber::NamedKernel& kernel : amber::available_kernels()) names.emplace_back(kernel.name);
    return names;
  }, "Names of the kernels that this processor can run, the fastest first.");
  py::class_<RowParser>(module, "RowParser")
      .def(py::init<std::size_t, std::uint32_t, std::vector<std::string>, std::string>(), py::arg("row_length"),
           py::arg("vocab_size"), py::arg("sources"), py::arg("kernel") = "",
           "Chooses the fastest kernel of this processor, or the one named.")
      .def("parse", &RowParser::parse, py::arg("text"), py::arg("start"), py::arg("stop"), py::arg("ids"),
           py::arg("codes"),
           "Parses lines of text[start:stop] into ids [n, row_length] uint16 and codes [n] uint8, n = len(codes); returns\n"
           "(rows, bytes consumed, lines, column of a fault or 0, its reason). text[stop - 1] is a newline, SLACK_BYTES\n"
           "bytes follow it, and ids has SLACK_IDS more behind the last row.")
      .def("format", &RowParser::format, py::arg("ids"), py::arg("codes"),
           "The JSONL of ids [n, row_length] and codes [n], as json.dumps lays it out.");
}
