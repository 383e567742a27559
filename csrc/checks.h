// Argument checks of one operator. Every message reads "operator: argument ... expected ...".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

#include "params.h"

namespace simple_moe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class Checks {
 public:
  // All tensors are to be on the device of this one, usually the first.
  Checks(const char* op, const char* reference_name, const Tensor& reference)
      : op_(op), reference_name_(reference_name), reference_(reference) {}

  const char* reference_name() const { return reference_name_; }
  const Tensor& reference() const { return reference_; }

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... message) const {
    std::ostringstream text;
    text << op_ << ": ";
    (text << ... << message);
    throw std::runtime_error(text.str());
  }
  template <class... Parts>
  void that(bool holds, const Parts&... message) const {
    if (!holds) fail(message...);
  }

  // `symbols` names the sizes as the documentation does: "(T, H)".
  void dims(const char* name, const Tensor& t, int64_t dims, const char* symbols) const;
  void shape(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
             const char* symbols) const;
  // Slots and rows are numbered by int32.
  void countable(const char* name, const Tensor& t, int64_t count, const char* symbols) const;

  DType floating(const char* name, const Tensor& t) const;
  void same_dtype(const char* name, const Tensor& t) const;  // As the reference.
  void int32(const char* name, const Tensor& t) const;
  bool int32_or_int64(const char* name, const Tensor& t) const;  // True for int64.
  // float32 or as the reference.
  void bias_dtype(const char* name, const Tensor& t) const;
  DType output_dtype(std::optional<ScalarType> given, DType otherwise) const;

  // The place of `value` among the names.
  size_t one_of(const char* name, const std::string& value,
                std::span<const char* const> names) const;

 private:
  void same_device(const char* name, const Tensor& t) const;

  const char* op_;
  const char* reference_name_;
  const Tensor& reference_;
};

// A text that is made when it is printed: a check that holds costs no strings.
template <class Make>
struct Text {
  friend std::ostream& operator<<(std::ostream& out, const Text& text) {
    return out << text.make();
  }
  Make make;
};
std::string list(std::span<const int64_t> sizes);        // [17, 64]
std::string device_name(const Tensor& t);                // cuda:0
std::string joined(std::span<const char* const> names);  // a, b, c
inline auto shape_of(const Tensor& t) {
  return Text{[&t] { return list({t.sizes().data(), t.sizes().size()}); }};
}
inline auto device_of(const Tensor& t) {
  return Text{[&t] { return device_name(t); }};
}
inline auto join(std::span<const char* const> names) {
  return Text{[names] { return joined(names); }};
}
const char* dtype_name(ScalarType dtype);  // float16, as torch prints it
DType dtype_of(const Tensor& t);           // Of one that is known to be floating.
ScalarType scalar_type_of(DType dtype);

}  // namespace simple_moe
