#include "checks.h"

#include <algorithm>

namespace simple_moe {
namespace {

constexpr const char* kFloats = "float32, float16 or bfloat16";

std::optional<DType> as_floating(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

}  // namespace

std::string list(std::span<const int64_t> sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}

std::string device_name(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  const std::string index = std::to_string(t.get_device_index());
  return t.is_cuda() ? "cuda:" + index : "another device";
}

std::string joined(std::span<const char* const> names) {
  std::string text;
  for (const char* name : names) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return torch::headeronly::toString(dtype);
  }
}

DType dtype_of(const Tensor& t) { return as_floating(t.scalar_type()).value(); }

ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    default:
      return ScalarType::Float;
  }
}

void Checks::same_device(const char* name, const Tensor& t) const {
  that(t.device() == reference_.device(), name, " is on ", device_of(t), ", expected ",
       device_of(reference_), " as ", reference_name_);
}

void Checks::dims(const char* name, const Tensor& t, int64_t dims, const char* symbols) const {
  same_device(name, t);
  that(t.dim() == dims, name, " has shape ", shape_of(t), ", expected ", dims,
       dims == 1 ? " dimension " : " dimensions ", symbols);
}

void Checks::shape(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes,
                   const char* symbols) const {
  same_device(name, t);
  const auto has = t.sizes();
  that(std::equal(has.begin(), has.end(), sizes.begin(), sizes.end()), name, " has shape ",
       shape_of(t), ", expected ", Text{[&] { return list({sizes.begin(), sizes.size()}); }}, " ",
       symbols);
}

void Checks::countable(const char* name, const Tensor& t, int64_t count,
                       const char* symbols) const {
  that(count < int64_t{1} << 31, name, " has shape ", shape_of(t), ", expected ", symbols,
       " < 2**31");
}

DType Checks::floating(const char* name, const Tensor& t) const {
  const auto dtype = as_floating(t.scalar_type());
  that(dtype.has_value(), name, " has dtype ", dtype_name(t.scalar_type()), ", expected ", kFloats);
  return *dtype;
}

void Checks::same_dtype(const char* name, const Tensor& t) const {
  that(t.scalar_type() == reference_.scalar_type(), name, " has dtype ",
       dtype_name(t.scalar_type()), ", expected ", dtype_name(reference_.scalar_type()), " as ",
       reference_name_);
}

void Checks::int32(const char* name, const Tensor& t) const {
  that(t.scalar_type() == ScalarType::Int, name, " has dtype ", dtype_name(t.scalar_type()),
       ", expected int32");
}

bool Checks::int32_or_int64(const char* name, const Tensor& t) const {
  const ScalarType type = t.scalar_type();
  that(type == ScalarType::Int || type == ScalarType::Long, name, " has dtype ", dtype_name(type),
       ", expected int32 or int64");
  return type == ScalarType::Long;
}

void Checks::bias_dtype(const char* name, const Tensor& t) const {
  const ScalarType type = t.scalar_type();
  that(type == ScalarType::Float || type == reference_.scalar_type(), name, " has dtype ",
       dtype_name(type), ", expected float32 or the dtype of ", reference_name_, ", ",
       dtype_name(reference_.scalar_type()));
}

DType Checks::output_dtype(std::optional<ScalarType> given, DType otherwise) const {
  if (!given) return otherwise;
  const auto dtype = as_floating(*given);
  that(dtype.has_value(), "output_dtype is ", dtype_name(*given), ", expected ", kFloats);
  return *dtype;
}

size_t Checks::one_of(const char* name, const std::string& value,
                      std::span<const char* const> names) const {
  const auto found = std::find(names.begin(), names.end(), value);
  that(found != names.end(), name, " is '", value, "', expected one of ", join(names));
  return static_cast<size_t>(found - names.begin());
}

}  // namespace simple_moe
