// tokred::KernelLaunch, a TensorRT plugin (8.6 to 10.14) that launches the kernel its fields
// describe. One plugin serves every kernel: there is nothing of any op in here.
#include "driver.h"
#include "kernel.h"

#include <NvInfer.h>
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

using namespace nvinfer1;

namespace
{

constexpr char const* kName = "KernelLaunch";
constexpr char const* kVersion = "1";
constexpr char const* kNamespace = "tokred";

ILoggerFinder* gLoggerFinder = nullptr;

void report(std::string const& what) noexcept
{
    ILogger* logger = gLoggerFinder == nullptr ? nullptr : gLoggerFinder->findLogger();
    std::string const text = std::string("tokred launcher: ") + what;
    if (logger != nullptr)
    {
        logger->log(ILogger::Severity::kERROR, text.c_str());
    }
    else
    {
        std::fprintf(stderr, "%s\n", text.c_str());
    }
}

DataType dataType(tokred::Type type)
{
    switch (type)
    {
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

class KernelLaunch final : public IPluginV2DynamicExt
{
public:
    explicit KernelLaunch(tokred::Kernel kernel)
        : mKernel(std::move(kernel))
        , mSerialized(mKernel.serialize())
    {
        for (tokred::Type type : mKernel.inputs)
        {
            mTypes.push_back(dataType(type));
        }
        for (tokred::Type type : mKernel.outputs)
        {
            mTypes.push_back(dataType(type));
        }
    }

    // What the plugin is.
    char const* getPluginType() const noexcept override
    {
        return kName;
    }
    char const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }
    void setPluginNamespace(char const* name) noexcept override
    {
        mNamespace = name;
    }
    char const* getPluginNamespace() const noexcept override
    {
        return mNamespace.c_str();
    }
    IPluginV2DynamicExt* clone() const noexcept override
    {
        try
        {
            auto* copy = new KernelLaunch(mKernel);
            copy->mNamespace = mNamespace;
            copy->mLoaded = mLoaded;
            return copy;
        }
        catch (std::exception const& error)
        {
            report(error.what());
            return nullptr;
        }
    }
    void destroy() noexcept override
    {
        delete this;
    }

    // Shapes and types.
    int32_t getNbOutputs() const noexcept override
    {
        return static_cast<int32_t>(mKernel.outputs.size());
    }
    DimsExprs getOutputDimensions(int32_t index, DimsExprs const* inputs, int32_t,
        IExprBuilder& builder) noexcept override
    {
        auto const& sizes = mKernel.outputDims[index];
        DimsExprs dims{};
        dims.nbDims = static_cast<int32_t>(sizes.size()) + 1;
        dims.d[0] = inputs[0].d[0]; // the batch
        for (size_t i = 0; i < sizes.size(); ++i)
        {
            dims.d[i + 1] = builder.constant(sizes[i]);
        }
        return dims;
    }
    DataType getOutputDataType(int32_t index, DataType const*, int32_t) const noexcept override
    {
        return mTypes[mKernel.inputs.size() + index];
    }
    bool supportsFormatCombination(int32_t position, PluginTensorDesc const* tensors,
        int32_t nbInputs, int32_t nbOutputs) noexcept override
    {
        if (static_cast<size_t>(nbInputs) != mKernel.inputs.size()
            || static_cast<size_t>(nbOutputs) != mKernel.outputs.size())
        {
            report("kernel " + mKernel.name + " takes " + std::to_string(mKernel.inputs.size())
                + " inputs and makes " + std::to_string(mKernel.outputs.size())
                + " outputs, its node has " + std::to_string(nbInputs) + " and "
                + std::to_string(nbOutputs));
            return false;
        }
        return tensors[position].format == TensorFormat::kLINEAR
            && tensors[position].type == mTypes[position];
    }
    void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
        int32_t) noexcept override
    {
    }
    size_t getWorkspaceSize(PluginTensorDesc const*, int32_t, PluginTensorDesc const*,
        int32_t) const noexcept override
    {
        return 0;
    }

    // Running.
    int32_t initialize() noexcept override
    {
        try
        {
            mLoaded = tokred::LoadedKernel::load(mKernel);
            return 0;
        }
        catch (std::exception const& error)
        {
            report(error.what());
            return 1;
        }
    }
    void terminate() noexcept override
    {
        mLoaded.reset();
    }
    int32_t enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*,
        void const* const* inputPointers, void* const* outputPointers, void*,
        cudaStream_t stream) noexcept override
    {
        try
        {
            if (!mLoaded)
            {
                throw std::runtime_error("kernel " + mKernel.name + " was not initialised");
            }
            auto const batch = static_cast<int32_t>(inputs[0].dims.d[0]);
            mLoaded->launch(mKernel, inputPointers, outputPointers, batch, stream);
            return 0;
        }
        catch (std::exception const& error)
        {
            report(error.what());
            return 1;
        }
    }

    // Plans.
    size_t getSerializationSize() const noexcept override
    {
        return mSerialized.size();
    }
    void serialize(void* buffer) const noexcept override
    {
        std::memcpy(buffer, mSerialized.data(), mSerialized.size());
    }

private:
    tokred::Kernel mKernel;
    std::string mSerialized;
    std::vector<DataType> mTypes; // inputs, then outputs
    std::string mNamespace{kNamespace};
    std::shared_ptr<tokred::LoadedKernel> mLoaded;
};

// The fields of a node, by name; throws std::invalid_argument where one is missing or mistyped.
class Fields
{
public:
    explicit Fields(PluginFieldCollection const* fields)
    {
        for (int32_t i = 0; i < fields->nbFields; ++i)
        {
            mFields[fields->fields[i].name] = &fields->fields[i];
        }
    }
    std::string text(char const* name) const
    {
        auto const& field = find(name, PluginFieldType::kCHAR);
        std::string value(static_cast<char const*>(field.data), field.length);
        value.erase(std::find(value.begin(), value.end(), '\0'), value.end());
        return value;
    }
    std::vector<int32_t> numbers(char const* name) const
    {
        auto const& field = find(name, PluginFieldType::kINT32);
        auto const* data = static_cast<int32_t const*>(field.data);
        return data == nullptr ? std::vector<int32_t>{} : std::vector<int32_t>(data, data + field.length);
    }
    int32_t number(char const* name) const
    {
        auto const values = numbers(name);
        if (values.size() != 1)
        {
            throw std::invalid_argument(std::string("field ") + name + " must be one number");
        }
        return values[0];
    }

private:
    PluginField const& find(char const* name, PluginFieldType type) const
    {
        auto const found = mFields.find(name);
        if (found == mFields.end() || found->second->type != type)
        {
            throw std::invalid_argument(std::string("field ") + name
                + (found == mFields.end() ? " is missing" : " has the wrong type"));
        }
        return *found->second;
    }
    std::map<std::string, PluginField const*> mFields;
};

tokred::Kernel kernelOf(Fields const& fields)
{
    tokred::Kernel kernel;
    kernel.name = fields.text("kernel");
    kernel.target = fields.number("target");
    kernel.ptx = fields.text("ptx");
    kernel.entry = fields.text("entry");
    auto const grid = fields.numbers("grid");
    if (grid.size() != 2)
    {
        throw std::invalid_argument("field grid must have two numbers");
    }
    kernel.grid[0] = grid[0];
    kernel.grid[1] = grid[1];
    kernel.block = fields.number("block");
    kernel.shared = fields.number("shared");
    kernel.inputs = tokred::parseTypes(fields.text("input_types"));
    kernel.extras = tokred::parseNumbers(fields.text("extras"));
    kernel.outputs = tokred::parseTypes(fields.text("output_types"));
    auto const dims = fields.numbers("output_dims");
    size_t at = 0;
    for (int32_t rank : fields.numbers("output_ranks"))
    {
        if (rank < 0 || at + rank > dims.size())
        {
            throw std::invalid_argument("output_ranks and output_dims contradict each other");
        }
        kernel.outputDims.emplace_back(dims.begin() + at, dims.begin() + at + rank);
        at += rank;
    }
    if (at != dims.size())
    {
        throw std::invalid_argument("output_ranks and output_dims contradict each other");
    }
    kernel.check();
    return kernel;
}

class Creator final : public IPluginCreator
{
public:
    Creator()
    {
        // The parser passes on only the attributes listed here.
        char const* const texts[] = {"kernel", "ptx", "entry", "input_types", "output_types", "extras"};
        char const* const numbers[]
            = {"target", "grid", "block", "shared", "output_ranks", "output_dims"};
        for (char const* name : texts)
        {
            mFields.emplace_back(name, nullptr, PluginFieldType::kCHAR, 1);
        }
        for (char const* name : numbers)
        {
            mFields.emplace_back(name, nullptr, PluginFieldType::kINT32, 1);
        }
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
    }
    char const* getPluginName() const noexcept override
    {
        return kName;
    }
    char const* getPluginVersion() const noexcept override
    {
        return kVersion;
    }
    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &mCollection;
    }
    IPluginV2* createPlugin(char const* name, PluginFieldCollection const* fields) noexcept override
    {
        return made(name, [&] { return kernelOf(Fields(fields)); });
    }
    IPluginV2* deserializePlugin(
        char const* name, void const* data, size_t size) noexcept override
    {
        return made(name, [&] { return tokred::Kernel::deserialize(data, size); });
    }
    void setPluginNamespace(char const*) noexcept override {} // it has one already
    char const* getPluginNamespace() const noexcept override
    {
        return kNamespace;
    }

private:
    template <typename Make>
    static IPluginV2* made(char const* name, Make&& make) noexcept
    {
        try
        {
            return new KernelLaunch(make());
        }
        catch (std::exception const& error)
        {
            report(std::string("node ") + name + ": " + error.what());
            return nullptr;
        }
    }
    std::vector<PluginField> mFields;
    PluginFieldCollection mCollection{};
};

Creator gCreator;

} // namespace

// What IPluginRegistry::loadLibrary and trtexec --dynamicPlugins look for.
extern "C" __attribute__((visibility("default"))) IPluginCreator* const* getPluginCreators(
    int32_t& count)
{
    static IPluginCreator* const creators[] = {&gCreator};
    count = 1;
    return creators;
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* finder)
{
    gLoggerFinder = finder;
}
