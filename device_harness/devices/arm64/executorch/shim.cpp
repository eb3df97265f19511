// Runs methods of an ExecuTorch program without torch, over the runtime that the official wheel's
// _portable_lib exports. A plain C interface, for device_harness/executorch_shim.py.

#include <executorch/runtime/core/data_loader.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/core/named_data_map.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

using namespace executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

namespace executorch::extension::threadpool {
// The wheel's own header of this class wants pthreadpool.h, which the wheel lacks.
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

// A file that stays mapped as long as the program.
class Mapped final : public DataLoader {
 public:
  Mapped(const void* data, size_t size) : data_(static_cast<const char*>(data)), size_(size) {}

  Result<FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    if (offset > size_ || size > size_ - offset) return Error::InvalidArgument;
    return FreeableBuffer(data_ + offset, size, nullptr);
  }

  Result<size_t> size() const override { return size_; }

 private:
  const char* data_;
  size_t size_;
};

// Grows as it is asked, and is freed whole.
class Heap final : public MemoryAllocator {
 public:
  Heap() : MemoryAllocator(0, nullptr) {}

  void* allocate(size_t size, size_t alignment = kDefaultAlignment) override {
    void* block = nullptr;
    if (alignment < sizeof(void*)) alignment = sizeof(void*);
    if (posix_memalign(&block, alignment, size ? size : 1)) return nullptr;
    blocks_.push_back(block);
    return block;
  }

  void reset() override {
    for (void* block : blocks_) free(block);
    blocks_.clear();
  }

  ~Heap() override { reset(); }

 private:
  std::vector<void*> blocks_;
};

// The class of weights in a file of their own; the wheel has no header of it. Its object, in a
// `Result`, begins with a pointer to its functions, or else with the error.
struct DataMap {
  alignas(16) unsigned char bytes[1024];
};
DataMap load_data_map(DataLoader*) asm(
    "_ZN10executorch9extension17FlatTensorDataMap4loadEPNS_7runtime10DataLoaderE");

struct Opened {
  std::unique_ptr<Mapped> file, weights;
  std::unique_ptr<Program> program;
  NamedDataMap* map = nullptr;  // stays until the process ends, as the program does
};

struct Loaded {
  Heap fixed, temporary;
  std::vector<std::vector<uint8_t>> buffers;
  std::vector<Span<uint8_t>> spans;
  std::unique_ptr<HierarchicalAllocator> planned;
  std::unique_ptr<MemoryManager> memory;
  std::unique_ptr<Method> method;
};

int code(Error error) { return static_cast<int>(error); }

}  // namespace

extern "C" {

void shim_threads(unsigned count) {
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(count);
}

// The bytes of the program and of its weights, if it has a file of them, aligned to pages, must stay;
// null where they are none, with the error.
void* shim_open(const void* data, size_t size, const void* weights, size_t weight_size, int* error) {
  runtime_init();
  auto opened = std::make_unique<Opened>();
  opened->file = std::make_unique<Mapped>(data, size);
  auto program = Program::load(opened->file.get(), Program::Verification::InternalConsistency);
  *error = code(program.error());
  if (!program.ok()) return nullptr;
  opened->program = std::make_unique<Program>(std::move(*program));
  if (weights) {
    opened->weights = std::make_unique<Mapped>(weights, weight_size);
    void* room = calloc(1, sizeof(DataMap));
    if (!room) return nullptr;
    auto* made = new (room) DataMap(load_data_map(opened->weights.get()));
    auto first = *reinterpret_cast<uintptr_t*>(made->bytes);
    if (first < 0x10000) {
      *error = static_cast<int>(first);
      return nullptr;
    }
    opened->map = reinterpret_cast<NamedDataMap*>(made->bytes);
  }
  return opened.release();
}

size_t shim_methods(void* program) { return static_cast<Opened*>(program)->program->num_methods(); }

const char* shim_method_name(void* program, size_t at) {
  auto name = static_cast<Opened*>(program)->program->get_method_name(at);
  return name.ok() ? *name : nullptr;
}

// How many inputs a method has, or a negative error.
long shim_inputs(void* program, const char* name) {
  auto meta = static_cast<Opened*>(program)->program->method_meta(name);
  return meta.ok() ? static_cast<long>(meta->num_inputs()) : -static_cast<long>(code(meta.error()));
}

void* shim_load(void* program, const char* name, int* error) {
  auto* opened = static_cast<Opened*>(program);
  auto meta = opened->program->method_meta(name);
  *error = code(meta.error());
  if (!meta.ok()) return nullptr;
  auto loaded = std::make_unique<Loaded>();
  for (size_t at = 0; at < meta->num_memory_planned_buffers(); at++) {
    auto size = meta->memory_planned_buffer_size(at);
    *error = code(size.error());
    if (!size.ok()) return nullptr;
    loaded->buffers.emplace_back(static_cast<size_t>(*size), 0);
  }
  for (auto& buffer : loaded->buffers) loaded->spans.emplace_back(buffer.data(), buffer.size());
  loaded->planned = std::make_unique<HierarchicalAllocator>(
      Span<Span<uint8_t>>(loaded->spans.data(), loaded->spans.size()));
  loaded->memory = std::make_unique<MemoryManager>(
      &loaded->fixed, loaded->planned.get(), &loaded->temporary);
  auto method = opened->program->load_method(name, loaded->memory.get(), nullptr, opened->map);
  *error = code(method.error());
  if (!method.ok()) return nullptr;
  loaded->method = std::make_unique<Method>(std::move(*method));
  return loaded.release();
}

// Runs a method without inputs, or of tokens int64[1, count] and a position int64[1].
int shim_run(void* loaded, const int64_t* tokens, int32_t count, int64_t position) {
  auto* method = static_cast<Loaded*>(loaded)->method.get();
  if (method->inputs_size() == 0) return code(method->execute());
  int32_t sizes[2] = {1, count}, strides[2] = {count, 1}, one[1] = {1};
  uint8_t order[2] = {0, 1};
  TensorImpl text(ScalarType::Long, 2, sizes, const_cast<int64_t*>(tokens), order, strides);
  TensorImpl place(ScalarType::Long, 1, one, &position, order, one);
  Error error = method->set_input(EValue(Tensor(&text)), 0);
  if (error == Error::Ok && method->inputs_size() > 1)
    error = method->set_input(EValue(Tensor(&place)), 1);
  if (error == Error::Ok) error = method->execute();
  return code(error);
}

size_t shim_results(void* loaded) { return static_cast<Loaded*>(loaded)->method->outputs_size(); }

// An integer, or a truth as one, among the results; 0 where it is one, else an error.
int shim_integer(void* loaded, size_t at, int64_t* value) {
  auto* method = static_cast<Loaded*>(loaded)->method.get();
  if (at >= method->outputs_size()) return code(Error::InvalidArgument);
  const EValue& result = method->get_output(at);
  if (!result.isInt() && !result.isBool()) return code(Error::InvalidType);
  *value = result.isInt() ? result.toInt() : result.toBool();
  return 0;
}

// A float32 tensor among the results: its rank, or a negative error; sizes has room for 8.
long shim_tensor(void* loaded, size_t at, int64_t* sizes, const float** data) {
  auto* method = static_cast<Loaded*>(loaded)->method.get();
  if (at >= method->outputs_size()) return -static_cast<long>(code(Error::InvalidArgument));
  const EValue& result = method->get_output(at);
  if (!result.isTensor()) return -static_cast<long>(code(Error::InvalidType));
  Tensor tensor = result.toTensor();
  if (tensor.scalar_type() != ScalarType::Float || tensor.dim() > 8)
    return -static_cast<long>(code(Error::InvalidType));
  for (long axis = 0; axis < tensor.dim(); axis++) sizes[axis] = tensor.size(axis);
  *data = tensor.const_data_ptr<float>();
  return tensor.dim();
}

}  // extern "C"
