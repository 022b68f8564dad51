// A device that lends its memory from the CPU and computes there, but will not mix: what a GPU refuses, it refuses.
#include <torch/extension.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/set_native.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>

using at::Tensor;
constexpr auto DEVICE = c10::DeviceType::PrivateUse1;

// --- memory and the one device -------------------------------------------------------------------------------------
struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t n) override {
    void* p = c10::alloc_cpu(n);
    return {p, p, &c10::free_cpu, at::Device(DEVICE, 0)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};
static Memory memory;
REGISTER_ALLOCATOR(DEVICE, &memory);

// One device, one stream that never waits
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static at::Device here() { return at::Device(DEVICE, 0); }
  static c10::Stream only() { return c10::Stream(c10::Stream::DEFAULT, here()); }
  c10::DeviceType type() const override { return DEVICE; }
  at::Device exchangeDevice(at::Device) const override { return here(); }
  at::Device getDevice() const override { return here(); }
  void setDevice(at::Device) const override {}
  void uncheckedSetDevice(at::Device) const noexcept override {}
  c10::Stream getStream(at::Device) const override { return only(); }
  c10::Stream getNewStream(at::Device, int) const override { return only(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Device getDeviceFromPtr(void*) const override { return at::Device(DEVICE, 0); }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

// --- copies: the only way across -----------------------------------------------------------------------------------
// The same memory, seen as a CPU tensor
static Tensor seen_from_cpu(const Tensor& x) {
  if (x.device().is_cpu()) return x;
  auto cpu = at::from_blob(x.mutable_data_ptr(), x.sizes(), x.strides(), [x](void*) {}, x.options().device(at::kCPU));
  if (x.is_conj()) cpu._set_conj(true);
  if (x.is_neg()) cpu._set_neg(true);
  return cpu;
}
static Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (to.numel()) seen_from_cpu(to).copy_(seen_from_cpu(from));
  return to;
}
static Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

static Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
static Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                            std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}
static at::Scalar item(const Tensor& x) { return at::_local_scalar_dense(seen_from_cpu(x)); }
static const Tensor& resize(const Tensor& x, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto n = at::detail::computeStorageNbytesContiguous(size, x.dtype().itemsize(), x.storage_offset());
  if (n > x.storage().nbytes()) {
    auto fresh = memory.allocate(n);
    if (x.storage().nbytes()) std::memcpy(fresh.get(), x.storage().data(), x.storage().nbytes());
    x.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    x.storage().unsafeGetStorageImpl()->set_nbytes(n);
  }
  x.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return x;
}

static Tensor& set_storage(Tensor& x, at::Storage s, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(s);
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return x;
}

// --- convolutions have names of their own on devices from outside --------------------------------------------------
static Tensor there(const Tensor& cpu) { return cpu.defined() ? cpu.to(at::Device(DEVICE, 0)) : cpu; }
static Tensor convolution(const Tensor& x, const Tensor& w, const std::optional<Tensor>& b, c10::IntArrayRef stride,
                          c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                          c10::IntArrayRef out_padding, int64_t groups) {
  TORCH_CHECK(x.device() == w.device(), "Expected all tensors to be on the same device, but found at least two: ",
              x.device(), " and ", w.device(), "!");
  std::optional<Tensor> bias;
  if (b && b->defined()) bias = seen_from_cpu(*b);
  return there(at::convolution(seen_from_cpu(x), seen_from_cpu(w), bias, stride, padding, dilation, transposed,
                               out_padding, groups));
}
static std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, c10::IntArrayRef stride, c10::IntArrayRef padding,
    c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef out_padding, int64_t groups,
    std::array<bool, 3> mask) {
  auto bias = w.size(transposed ? 1 : 0)*(transposed ? groups : 1);
  auto [a, b, c] = at::convolution_backward(seen_from_cpu(g), seen_from_cpu(x), seen_from_cpu(w),
                                            c10::IntArrayRef(bias), stride, padding, dilation, transposed, out_padding,
                                            groups, mask);
  return {there(a), there(b), there(c)};
}

// --- everything else: on the CPU, if all that is not a number is here ----------------------------------------------
static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto n = schema.arguments().size();
  const auto begin = stack->size() - n;
  const bool index = schema.name().find("index") != std::string::npos;  // as a GPU, it takes CPU indices
  std::optional<Tensor> stranger;
  auto look = [&](const Tensor& x) {
    if (x.defined() && x.device().is_cpu() && x.dim() > 0) stranger = x;
  };
  for (size_t i = 0; i < n; i++) {
    const auto& v = (*stack)[begin+i];
    if (v.isTensor()) look(v.toTensor());
    else if (v.isTensorList() && !index) for (const Tensor& x : v.toTensorList()) look(x);
    else if (v.isOptionalTensorList() && !index)
      for (const std::optional<Tensor>& x : v.toOptionalTensorList()) if (x) look(*x);
  }
  TORCH_CHECK(!stranger, "Expected all tensors to be on the same device, but found at least two: ",
              at::Device(DEVICE, 0), " and cpu! (", schema.name(), ")");
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", [](Tensor& x, at::Storage s) -> Tensor& {
    return set_storage(x, s, 0, {static_cast<int64_t>(s.nbytes()/x.dtype().itemsize())}, {1});
  });
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { at::RegisterPrivateUse1HooksInterface(new Hooks()); }
