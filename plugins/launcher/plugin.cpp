// tokred::KernelLaunch, a TensorRT plugin (8.6 to 10.14) that launches the kernel its fields
// describe. One plugin serves every kernel: there is nothing of any op in here.
#include "driver.h"
#include "kernel.h"

#include <NvInfer.h>
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using namespace nvinfer1;

namespace {

constexpr char const* kName = "KernelLaunch";
constexpr char const* kVersion = "1";
constexpr char const* kNamespace = "tokred";

std::atomic<ILoggerFinder*> gLoggerFinder{nullptr};

// Does not allocate: what there is to say may be that memory ran out.
void report(char const* what) noexcept {
    char text[2048];
    std::snprintf(text, sizeof text, "tokred launcher: %s", what);
    ILoggerFinder* finder = gLoggerFinder;
    ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
    if (logger != nullptr) {
        logger->log(ILogger::Severity::kERROR, text);
    } else {
        std::fprintf(stderr, "%s\n", text);
    }
}

// TensorRT's interface is noexcept: what the body throws becomes a message and ``failed``.
template <typename Result, typename Body>
Result guarded(Result failed, Body&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& error) {
        report(error.what());
        return failed;
    }
}

DataType dataType(tokred::Type type) {
    switch (type) {
    case tokred::Type::fp32: return DataType::kFLOAT;
    case tokred::Type::fp16: return DataType::kHALF;
    case tokred::Type::i32: return DataType::kINT32;
    case tokred::Type::i1: return DataType::kBOOL;
    case tokred::Type::bf16: break;
    }
#if NV_TENSORRT_MAJOR >= 9
    return DataType::kBF16;
#else
    throw std::invalid_argument("this TensorRT has no bfloat16: build the engine in float16");
#endif
}

// What all clones of a plugin share, since TensorRT makes many and PTX is long.
struct Described {
    explicit Described(tokred::Kernel given)
        : kernel(std::move(given)) {
        for (auto const* list : {&kernel.inputs, &kernel.outputs}) {
            std::transform(list->begin(), list->end(), std::back_inserter(types), dataType);
        }
    }
    tokred::Kernel const kernel;
    std::vector<DataType> types; // inputs, then outputs
};

class KernelLaunch final : public IPluginV2DynamicExt {
public:
    explicit KernelLaunch(tokred::Kernel kernel)
        : mDescribed(std::make_shared<Described>(std::move(kernel))) {}

    // What the plugin is.
    char const* getPluginType() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    void setPluginNamespace(char const*) noexcept override {} // it has one already
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
    IPluginV2DynamicExt* clone() const noexcept override {
        // TensorRT does not initialise the clone that an execution context gets.
        return guarded<IPluginV2DynamicExt*>(nullptr, [&] { return new KernelLaunch(*this); });
    }
    void destroy() noexcept override { delete this; }

    // Shapes and types.
    int32_t getNbOutputs() const noexcept override {
        return static_cast<int32_t>(kernel().outputs.size());
    }
    DimsExprs getOutputDimensions(int32_t index, DimsExprs const* inputs, int32_t nbInputs,
        IExprBuilder& builder) noexcept override {
        return guarded(DimsExprs{}, [&] {
            checkCounts(nbInputs, getNbOutputs());
            if (inputs[0].nbDims < 1) {
                throw std::invalid_argument("the first input of kernel " + kernel().name
                    + " is a scalar, expected the batch as its first dimension");
            }
            auto const& sizes = kernel().outputDims.at(index);
            DimsExprs dims{};
            dims.nbDims = static_cast<int32_t>(sizes.size()) + 1;
            dims.d[0] = inputs[0].d[0];
            for (size_t i = 0; i < sizes.size(); ++i) {
                dims.d[i + 1] = builder.constant(sizes[i]);
            }
            return dims;
        });
    }
    DataType getOutputDataType(int32_t index, DataType const*, int32_t) const noexcept override {
        return mDescribed->types[kernel().inputs.size() + index];
    }
    bool supportsFormatCombination(int32_t position, PluginTensorDesc const* tensors,
        int32_t nbInputs, int32_t nbOutputs) noexcept override {
        return guarded(false, [&] {
            checkCounts(nbInputs, nbOutputs);
            return tensors[position].format == TensorFormat::kLINEAR
                && tensors[position].type == mDescribed->types.at(position);
        });
    }
    void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
        int32_t) noexcept override {}
    size_t getWorkspaceSize(PluginTensorDesc const* inputs, int32_t, PluginTensorDesc const*,
        int32_t) const noexcept override {
        return kernel().workspace(inputs[0].dims.d[0]);
    }

    // Running.
    int32_t initialize() noexcept override {
        return guarded(1, [&] {
            mLoaded = tokred::LoadedKernel::load(kernel());
            return 0;
        });
    }
    void terminate() noexcept override { mLoaded.reset(); }
    int32_t enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*,
        void const* const* inputPointers, void* const* outputPointers, void* workspace,
        cudaStream_t stream) noexcept override {
        return guarded(1, [&] {
            if (!mLoaded) {
                throw std::logic_error("kernel " + kernel().name + " was not initialised");
            }
            int64_t const batch = inputs[0].dims.d[0];
            mLoaded->launch(kernel(), inputPointers, outputPointers, workspace, batch, stream);
            return 0;
        });
    }

    // Plans.
    size_t getSerializationSize() const noexcept override {
        return guarded<size_t>(0, [&] { return kernel().serialize().size(); });
    }
    void serialize(void* buffer) const noexcept override {
        guarded(false, [&] {
            std::string const bytes = kernel().serialize();
            std::memcpy(buffer, bytes.data(), bytes.size());
            return true;
        });
    }

private:
    KernelLaunch(KernelLaunch const&) = default;

    tokred::Kernel const& kernel() const { return mDescribed->kernel; }
    void checkCounts(int32_t nbInputs, int32_t nbOutputs) const {
        size_t const inputs = kernel().inputs.size();
        size_t const outputs = kernel().outputs.size();
        if (static_cast<size_t>(nbInputs) != inputs || static_cast<size_t>(nbOutputs) != outputs) {
            throw std::invalid_argument("kernel " + kernel().name + " takes "
                + std::to_string(inputs) + " inputs and makes " + std::to_string(outputs)
                + " outputs, and its node has " + std::to_string(nbInputs) + " and "
                + std::to_string(nbOutputs));
        }
    }

    std::shared_ptr<Described const> mDescribed;
    std::shared_ptr<tokred::LoadedKernel const> mLoaded; // from initialize() to terminate()
};

// TensorRT's parser passes on only the attributes listed here, and converts them to these types.
std::vector<PluginField> const& fieldList() {
    constexpr auto kText = PluginFieldType::kCHAR;
    constexpr auto kNumbers = PluginFieldType::kINT32;
    // Engines may outlive static objects: never destroyed.
    static auto const& fields = *new std::vector<PluginField>{{"kernel", nullptr, kText, 1},
        {"target", nullptr, kNumbers, 1}, {"ptx", nullptr, kText, 1}, {"entry", nullptr, kText, 1},
        {"grid", nullptr, kNumbers, 2}, {"block", nullptr, kNumbers, 1},
        {"shared", nullptr, kNumbers, 1}, {"scratch", nullptr, kNumbers, 1},
        {"input_types", nullptr, kText, 1},
        {"extras", nullptr, kText, 1}, {"output_types", nullptr, kText, 1},
        {"output_ranks", nullptr, kNumbers, 1}, {"output_dims", nullptr, kNumbers, 1}};
    return fields;
}

std::string asText(PluginField const& field) {
    std::string text;
    if (field.data == nullptr || field.length <= 0) {
        return text;
    }
    if (field.type == PluginFieldType::kCHAR) {
        // Some releases count the NUL at the end as a character.
        text.assign(static_cast<char const*>(field.data), field.length);
        text.erase(std::find(text.begin(), text.end(), '\0'), text.end());
        return text;
    }
    for (int32_t i = 0; i < field.length; ++i) {
        text += std::to_string(static_cast<int32_t const*>(field.data)[i]) + " ";
    }
    return text;
}

tokred::Fields fieldsOf(PluginFieldCollection const* given) {
    tokred::Fields fields;
    for (int32_t i = 0; given != nullptr && i < given->nbFields; ++i) {
        PluginField const& field = given->fields[i];
        for (PluginField const& known : fieldList()) {
            if (field.name == nullptr || std::strcmp(field.name, known.name) != 0) {
                continue;
            }
            if (field.type != known.type) {
                throw std::invalid_argument(std::string("field ") + known.name
                    + " has the wrong type, expected "
                    + (known.type == PluginFieldType::kCHAR ? "a string" : "32-bit integers"));
            }
            fields[known.name] = asText(field);
        }
    }
    return fields;
}

class Creator final : public IPluginCreator {
public:
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    PluginFieldCollection const* getFieldNames() noexcept override { return &mCollection; }
    IPluginV2* createPlugin(
        char const* name, PluginFieldCollection const* fields) noexcept override {
        return made(name, [&] { return tokred::Kernel(fieldsOf(fields)); });
    }
    IPluginV2* deserializePlugin(
        char const* name, void const* data, size_t size) noexcept override {
        return made(name, [&] { return tokred::Kernel::deserialize(data, size); });
    }
    void setPluginNamespace(char const*) noexcept override {} // it has one already
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    template <typename Make>
    static IPluginV2* made(char const* name, Make&& make) noexcept {
        return guarded<IPluginV2*>(nullptr, [&]() -> IPluginV2* {
            try {
                return new KernelLaunch(make());
            } catch (std::invalid_argument const& error) {
                throw std::invalid_argument(
                    std::string("node ") + (name == nullptr ? "?" : name) + ": " + error.what());
            }
        });
    }
    PluginFieldCollection mCollection{
        static_cast<int32_t>(fieldList().size()), fieldList().data()};
};

} // namespace

// What IPluginRegistry::loadLibrary and trtexec --dynamicPlugins look for.
extern "C" __attribute__((visibility("default"))) IPluginCreator* const* getPluginCreators(
    int32_t& count) {
    static IPluginCreator* const creators[] = {new Creator}; // TensorRT may ask it to the very end
    count = 1;
    return creators;
}

// Read from the file, without loading it: into another major release it could only crash.
#define TOKRED_TEXT_OF(x) #x
#define TOKRED_TEXT(x) TOKRED_TEXT_OF(x)
extern "C" __attribute__((visibility("default"))) char const tokredLauncherRelease[]
    = "tokred launcher for TensorRT " TOKRED_TEXT(NV_TENSORRT_MAJOR) "." TOKRED_TEXT(NV_TENSORRT_MINOR);

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* finder) {
    gLoggerFinder = finder;
}
