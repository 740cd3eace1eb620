// A stand-in for the parts of TensorRT's NvInfer.h that the launcher plugin uses, so that it can
// be built and run where TensorRT is not. Names and types only are TensorRT's; the layout of
// these classes is not, and a library built with this header is of no use to TensorRT.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef NV_TENSORRT_MAJOR
#define NV_TENSORRT_MAJOR 10
#endif
#define NV_TENSORRT_MINOR 6

typedef struct CUstream_st* cudaStream_t;

namespace nvinfer1 {

enum class DataType : int32_t {
    kFLOAT = 0,
    kHALF = 1,
    kINT8 = 2,
    kINT32 = 3,
    kBOOL = 4,
#if NV_TENSORRT_MAJOR >= 9
    kBF16 = 7
#endif
};

enum class TensorFormat : int32_t { kLINEAR = 0, kCHW2 = 1, kHWC8 = 2, kCHW4 = 3 };

struct Dims {
    int32_t nbDims;
#if NV_TENSORRT_MAJOR >= 10
    int64_t d[8];
#else
    int32_t d[8];
#endif
};

struct PluginTensorDesc {
    Dims dims;
    DataType type;
    TensorFormat format;
    float scale;
};

struct DynamicPluginTensorDesc {
    PluginTensorDesc desc;
    Dims min, max;
};

class IDimensionExpr {
public:
    virtual ~IDimensionExpr() = default;
    virtual bool isConstant() const noexcept = 0;
    virtual int64_t getConstantValue() const noexcept = 0;
};

struct DimsExprs {
    int32_t nbDims;
    IDimensionExpr const* d[8];
};

class IExprBuilder {
public:
    virtual ~IExprBuilder() = default;
    virtual IDimensionExpr const* constant(int64_t value) noexcept = 0;
};

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3 };
    virtual ~ILogger() = default;
    virtual void log(Severity severity, char const* text) noexcept = 0;
};

class ILoggerFinder {
public:
    virtual ~ILoggerFinder() = default;
    virtual ILogger* findLogger() = 0;
};

enum class PluginFieldType : int32_t { kFLOAT32 = 1, kINT32 = 5, kCHAR = 6 };

struct PluginField {
    PluginField(char const* aName, void const* someData, PluginFieldType aType, int32_t aLength)
        : name(aName)
        , data(someData)
        , type(aType)
        , length(aLength) {}
    char const* name;
    void const* data;
    PluginFieldType type;
    int32_t length;
};

struct PluginFieldCollection {
    int32_t nbFields;
    PluginField const* fields;
};

class IPluginV2 {
public:
    virtual char const* getPluginType() const noexcept = 0;
    virtual char const* getPluginVersion() const noexcept = 0;
    virtual int32_t getNbOutputs() const noexcept = 0;
    virtual int32_t initialize() noexcept = 0;
    virtual void terminate() noexcept = 0;
    virtual size_t getSerializationSize() const noexcept = 0;
    virtual void serialize(void* buffer) const noexcept = 0;
    virtual void destroy() noexcept = 0;
    virtual void setPluginNamespace(char const* name) noexcept = 0;
    virtual char const* getPluginNamespace() const noexcept = 0;

    IPluginV2() = default;
    virtual ~IPluginV2() = default;

protected:
    IPluginV2(IPluginV2 const&) = default;
};

class IPluginV2DynamicExt : public IPluginV2 {
public:
    virtual IPluginV2DynamicExt* clone() const noexcept = 0;
    virtual DataType getOutputDataType(
        int32_t index, DataType const* inputs, int32_t nbInputs) const noexcept = 0;
    virtual DimsExprs getOutputDimensions(int32_t index, DimsExprs const* inputs, int32_t nbInputs,
        IExprBuilder& builder) noexcept = 0;
    virtual bool supportsFormatCombination(int32_t position, PluginTensorDesc const* tensors,
        int32_t nbInputs, int32_t nbOutputs) noexcept = 0;
    virtual void configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
        DynamicPluginTensorDesc const* outputs, int32_t nbOutputs) noexcept = 0;
    virtual size_t getWorkspaceSize(PluginTensorDesc const* inputs, int32_t nbInputs,
        PluginTensorDesc const* outputs, int32_t nbOutputs) const noexcept = 0;
    virtual int32_t enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const* outputs,
        void const* const* inputPointers, void* const* outputPointers, void* workspace,
        cudaStream_t stream) noexcept = 0;
};

class IPluginCreator {
public:
    virtual ~IPluginCreator() = default;
    virtual char const* getPluginName() const noexcept = 0;
    virtual char const* getPluginVersion() const noexcept = 0;
    virtual PluginFieldCollection const* getFieldNames() noexcept = 0;
    virtual IPluginV2* createPlugin(
        char const* name, PluginFieldCollection const* fields) noexcept = 0;
    virtual IPluginV2* deserializePlugin(
        char const* name, void const* data, size_t size) noexcept = 0;
    virtual void setPluginNamespace(char const* name) noexcept = 0;
    virtual char const* getPluginNamespace() const noexcept = 0;
};

} // namespace nvinfer1
