#include "driver.h"

#include <cuda.h>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace tokred
{
namespace
{

// The few functions needed, resolved once.
struct Driver
{
    decltype(&cuModuleLoadData) moduleLoadData{};
    decltype(&cuModuleUnload) moduleUnload{};
    decltype(&cuModuleGetFunction) moduleGetFunction{};
    decltype(&cuFuncSetAttribute) funcSetAttribute{};
    decltype(&cuLaunchKernel) launchKernel{};
    decltype(&cuCtxGetCurrent) ctxGetCurrent{};
    decltype(&cuCtxGetDevice) ctxGetDevice{};
    decltype(&cuDeviceGetAttribute) deviceGetAttribute{};
    decltype(&cuDeviceGetName) deviceGetName{};
    decltype(&cuGetErrorString) getErrorString{};

    static Driver const& get()
    {
        static Driver const driver;
        return driver;
    }

private:
    Driver()
    {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
        {
            throw std::runtime_error("there is no CUDA driver here (libcuda.so.1)");
        }
        find(library, "cuModuleLoadData", moduleLoadData);
        find(library, "cuModuleUnload", moduleUnload);
        find(library, "cuModuleGetFunction", moduleGetFunction);
        find(library, "cuFuncSetAttribute", funcSetAttribute);
        find(library, "cuLaunchKernel", launchKernel);
        find(library, "cuCtxGetCurrent", ctxGetCurrent);
        find(library, "cuCtxGetDevice", ctxGetDevice);
        find(library, "cuDeviceGetAttribute", deviceGetAttribute);
        find(library, "cuDeviceGetName", deviceGetName);
        find(library, "cuGetErrorString", getErrorString);
    }
    template <typename F>
    static void find(void* library, char const* name, F& function)
    {
        function = reinterpret_cast<F>(dlsym(library, name));
        if (function == nullptr)
        {
            throw std::runtime_error(std::string("the CUDA driver lacks ") + name);
        }
    }
};

void check(CUresult status, std::string const& what)
{
    if (status == CUDA_SUCCESS)
    {
        return;
    }
    char const* text = nullptr;
    Driver::get().getErrorString(status, &text);
    throw std::runtime_error(what + ": " + (text == nullptr ? "unknown error" : text));
}

// "NVIDIA H200 (9.0)" of the current context.
std::pair<std::string, int32_t> currentDevice()
{
    Driver const& driver = Driver::get();
    CUdevice device{};
    check(driver.ctxGetDevice(&device), "no CUDA context is current");
    char name[128] = "?";
    int major = 0;
    int minor = 0;
    driver.deviceGetName(name, sizeof name, device);
    driver.deviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
    driver.deviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
    return {std::string(name) + " (" + std::to_string(major) + "." + std::to_string(minor) + ")",
        10 * major + minor};
}

class Module final : public LoadedKernel
{
public:
    explicit Module(Kernel const& kernel)
    {
        Driver const& driver = Driver::get();
        auto const [device, sm] = currentDevice();
        std::string const what = "kernel " + kernel.name + " for compute capability "
            + std::to_string(kernel.target / 10) + "." + std::to_string(kernel.target % 10) + " on "
            + device;
        // From 9.0 on the code uses instructions of one generation only.
        if (sm < kernel.target || (kernel.target >= 90 && sm != kernel.target))
        {
            throw std::runtime_error(what + ": it does not run there; build the engine on this GPU");
        }
        check(driver.moduleLoadData(&mModule, kernel.ptx.c_str()), what + " does not load");
        try
        {
            check(driver.moduleGetFunction(&mFunction, mModule, kernel.entry.c_str()),
                what + " has no entry " + kernel.entry);
            if (kernel.shared > kDefaultShared)
            {
                check(driver.funcSetAttribute(mFunction,
                          CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared),
                    what + " needs " + std::to_string(kernel.shared) + " bytes of shared memory");
            }
        }
        catch (...)
        {
            driver.moduleUnload(mModule);
            throw;
        }
    }
    ~Module() override
    {
        // The context may be gone by now, and the module with it; nobody could act on the error.
        Driver::get().moduleUnload(mModule);
    }
    Module(Module const&) = delete;
    Module& operator=(Module const&) = delete;

    void launch(Kernel const& kernel, void const* const* inputs, void* const* outputs,
        int32_t batch, void* stream) const override
    {
        if (batch == 0)
        {
            return;
        }
        // cuLaunchKernel takes the address of each argument.
        std::vector<void*> arguments;
        arguments.reserve(kernel.inputs.size() + kernel.extras.size() + kernel.outputs.size());
        for (size_t i = 0; i < kernel.inputs.size(); ++i)
        {
            arguments.push_back(const_cast<void const**>(inputs + i));
        }
        for (int32_t const& extra : kernel.extras)
        {
            arguments.push_back(const_cast<int32_t*>(&extra));
        }
        for (size_t i = 0; i < kernel.outputs.size(); ++i)
        {
            arguments.push_back(const_cast<void**>(outputs + i));
        }
        check(Driver::get().launchKernel(mFunction, kernel.grid[0], kernel.grid[1], batch,
                  kernel.block, 1, 1, kernel.shared, static_cast<CUstream>(stream),
                  arguments.data(), nullptr),
            "kernel " + kernel.name + " cannot be launched");
    }

private:
    static constexpr int32_t kDefaultShared = 48 * 1024; // more must be asked for
    CUmodule mModule{};
    CUfunction mFunction{};
};

} // namespace

std::shared_ptr<LoadedKernel> LoadedKernel::load(Kernel const& kernel)
{
    // Entry and shared memory follow from the PTX, so that it alone is the key beside the context.
    static std::mutex mutex;
    static std::map<std::pair<CUcontext, std::string>, std::weak_ptr<LoadedKernel>> loaded;
    std::lock_guard<std::mutex> const lock(mutex);
    CUcontext context{};
    check(Driver::get().ctxGetCurrent(&context), "no CUDA context is current");
    auto& slot = loaded[{context, kernel.ptx}];
    auto module = slot.lock();
    if (!module)
    {
        module = std::make_shared<Module>(kernel);
        slot = module;
    }
    return module;
}

} // namespace tokred
