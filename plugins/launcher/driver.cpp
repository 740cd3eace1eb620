#include "driver.h"

#include <algorithm>
#include <cuda.h>
#include <dlfcn.h>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace tokred {
namespace {

constexpr int32_t kDefaultShared = 48 * 1024; // bytes that a block has without asking
constexpr int64_t kMaxBatch = 65535;          // blocks along z

// The few functions needed, resolved once and never let go: engines may outlive static objects.
struct Driver {
    decltype(&cuModuleLoadDataEx) moduleLoadDataEx{};
    decltype(&cuModuleUnload) moduleUnload{};
    decltype(&cuModuleGetFunction) moduleGetFunction{};
    decltype(&cuFuncSetAttribute) funcSetAttribute{};
    decltype(&cuLaunchKernel) launchKernel{};
    decltype(&cuCtxGetCurrent) ctxGetCurrent{};
    decltype(&cuCtxGetDevice) ctxGetDevice{};
    decltype(&cuCtxPushCurrent) ctxPushCurrent{};
    decltype(&cuCtxPopCurrent) ctxPopCurrent{};
    decltype(&cuDeviceGetAttribute) deviceGetAttribute{};
    decltype(&cuDeviceGetName) deviceGetName{};
    decltype(&cuDriverGetVersion) driverGetVersion{};
    decltype(&cuGetErrorString) getErrorString{};

    static Driver const& get() {
        static Driver const driver;
        return driver;
    }

private:
    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            char const* why = dlerror();
            throw std::runtime_error(std::string("there is no CUDA driver here: ")
                + (why == nullptr ? "libcuda.so.1 does not load" : why));
        }
        find(library, "cuModuleLoadDataEx", moduleLoadDataEx);
        find(library, "cuModuleUnload", moduleUnload);
        find(library, "cuModuleGetFunction", moduleGetFunction);
        find(library, "cuFuncSetAttribute", funcSetAttribute);
        find(library, "cuLaunchKernel", launchKernel);
        find(library, "cuCtxGetCurrent", ctxGetCurrent);
        find(library, "cuCtxGetDevice", ctxGetDevice);
        find(library, "cuCtxPushCurrent_v2", ctxPushCurrent);
        find(library, "cuCtxPopCurrent_v2", ctxPopCurrent);
        find(library, "cuDeviceGetAttribute", deviceGetAttribute);
        find(library, "cuDeviceGetName", deviceGetName);
        find(library, "cuDriverGetVersion", driverGetVersion);
        find(library, "cuGetErrorString", getErrorString);
    }
    template <typename F>
    static void find(void* library, char const* name, F& function) {
        function = reinterpret_cast<F>(dlsym(library, name));
        if (function == nullptr) {
            throw std::runtime_error(std::string("the CUDA driver is too old, it lacks ") + name);
        }
    }
};

void check(CUresult status, std::string const& what) {
    if (status != CUDA_SUCCESS) {
        char const* text = nullptr;
        Driver::get().getErrorString(status, &text);
        throw std::runtime_error(what + " (CUDA error " + std::to_string(status) + ": "
            + (text == nullptr ? "unknown" : text) + ")");
    }
}

CUcontext currentContext() {
    CUcontext context{};
    check(Driver::get().ctxGetCurrent(&context), "the current CUDA context is not known");
    if (context == nullptr) {
        throw std::runtime_error("no CUDA context is current");
    }
    return context;
}

std::string capability(int32_t sm) {
    return std::to_string(sm / 10) + "." + std::to_string(sm % 10);
}

class Module final : public LoadedKernel {
public:
    // Nothing is loaded yet, so that load() may throw and this be destroyed as usual.
    Module(CUcontext context, Kernel const& kernel)
        : mContext(context)
        , mPtx(kernel.ptx())
        , mEntry(kernel.entry)
        , mShared(kernel.shared) {}
    ~Module() override {
        if (mModule == nullptr) {
            return;
        }
        // A module is unloaded in its own context, and an engine may be destroyed in a thread
        // that has another, or none. Where the context is gone, as at the end of the process, so
        // is the module: the driver refuses the context and nothing is left to do.
        Driver const& driver = Driver::get();
        if (driver.ctxPushCurrent(mContext) == CUDA_SUCCESS) {
            driver.moduleUnload(mModule);
            CUcontext popped{};
            driver.ctxPopCurrent(&popped);
        }
    }
    Module(Module const&) = delete;
    Module& operator=(Module const&) = delete;

    bool serves(CUcontext context, Kernel const& kernel) const {
        return mContext == context && mShared == kernel.shared && mEntry == kernel.entry
            && mPtx == kernel.ptx();
    }

    void loadFor(Kernel const& kernel) {
        Driver const& driver = Driver::get();
        CUdevice device{};
        check(driver.ctxGetDevice(&device), "the current CUDA device is not known");
        auto const [gpu, sm] = describe(device);
        std::string const what
            = "kernel " + kernel.name + " for compute capability " + capability(kernel.target);
        if (kernel.targetOnly ? sm != kernel.target : sm < kernel.target) {
            throw std::runtime_error(
                what + " does not run on " + gpu + ": build the engine for it");
        }
        compile(kernel, what + " on " + gpu);
        // This loads the code, also where the driver is lazy; a launch has nothing left to load.
        check(driver.moduleGetFunction(&mFunction, mModule, kernel.entry.c_str()),
            what + " on " + gpu + " has no entry " + kernel.entry);
        if (kernel.shared > kDefaultShared) {
            check(driver.funcSetAttribute(
                      mFunction, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared),
                what + " on " + gpu + " does not get " + std::to_string(kernel.shared)
                    + " bytes of shared memory a block");
        }
    }

    void launch(Kernel const& kernel, void const* const* inputs, void* const* outputs,
        void* workspace, int64_t batch, void* stream) const override {
        if (batch == 0) {
            return;
        }
        if (batch < 0 || batch > kMaxBatch) {
            throw std::runtime_error("kernel " + kernel.name + " takes a batch of at most "
                + std::to_string(kMaxBatch) + ", found " + std::to_string(batch));
        }
        // The driver takes the address of each argument, and reads them before it returns.
        std::vector<void*> arguments;
        arguments.reserve(kernel.inputs.size() + kernel.extras.size() + kernel.outputs.size() + 1);
        for (size_t i = 0; i < kernel.inputs.size(); ++i) {
            arguments.push_back(const_cast<void const**>(inputs + i));
        }
        for (int32_t const& extra : kernel.extras) {
            arguments.push_back(const_cast<int32_t*>(&extra));
        }
        for (size_t i = 0; i < kernel.outputs.size(); ++i) {
            arguments.push_back(const_cast<void**>(outputs + i));
        }
        if (kernel.scratch > 0) {
            arguments.push_back(&workspace);
        }
        CUresult const status = Driver::get().launchKernel(mFunction, kernel.grid[0],
            kernel.grid[1], static_cast<unsigned>(batch), kernel.block, 1, 1, kernel.shared,
            static_cast<CUstream>(stream), arguments.data(), nullptr);
        if (status != CUDA_SUCCESS) {
            CUcontext current{};
            Driver::get().ctxGetCurrent(&current);
            check(status,
                "kernel " + kernel.name
                    + (current == mContext ? " cannot be launched"
                                           : " was loaded in another CUDA context than the current "
                                             "one: create an engine and run it in the same"));
        }
    }

private:
    // "NVIDIA H200 (9.0)" and 90.
    static std::pair<std::string, int32_t> describe(CUdevice device) {
        Driver const& driver = Driver::get();
        char name[128] = "GPU";
        driver.deviceGetName(name, sizeof name, device);
        int major = 0;
        int minor = 0;
        std::string const what = std::string(name) + " does not say its compute capability";
        auto const ask = driver.deviceGetAttribute;
        check(ask(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device), what);
        check(ask(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device), what);
        int32_t const sm = 10 * major + minor;
        return {std::string(name) + " (" + capability(sm) + ")", sm};
    }

    void compile(Kernel const& kernel, std::string what) {
        Driver const& driver = Driver::get();
        char log[1024] = "";
        CUjit_option options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
        void* values[] = {log, reinterpret_cast<void*>(sizeof log - 1)};
        CUresult const status
            = driver.moduleLoadDataEx(&mModule, kernel.ptx().c_str(), 2, options, values);
        if (status == CUDA_SUCCESS) {
            return;
        }
        mModule = nullptr;
        if (status == CUDA_ERROR_UNSUPPORTED_PTX_VERSION) {
            int version = 0;
            driver.driverGetVersion(&version);
            what += " has PTX " + kernel.ptxVersion + ", which this driver (CUDA "
                + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10)
                + ") is too old to read: update it";
        } else {
            what += " does not load";
        }
        std::string said = log;
        said.erase(said.find_last_not_of(" \n") + 1);
        std::replace(said.begin(), said.end(), '\n', ' '); // one message is one line
        check(status, said.empty() ? what : what + ": " + said);
    }

    CUcontext const mContext;
    std::string const mPtx;
    std::string const mEntry;
    int32_t const mShared;
    CUmodule mModule{};
    CUfunction mFunction{};
};

} // namespace

std::shared_ptr<LoadedKernel const> LoadedKernel::load(Kernel const& kernel) {
    static std::mutex mutex;
    static std::vector<std::weak_ptr<Module>> loaded; // a handful, so a search will do
    CUcontext const context = currentContext();
    std::lock_guard<std::mutex> const lock(mutex);
    loaded.erase(std::remove_if(loaded.begin(), loaded.end(),
                     [](std::weak_ptr<Module> const& entry) { return entry.expired(); }),
        loaded.end());
    for (auto const& entry : loaded) {
        auto module = entry.lock();
        if (module && module->serves(context, kernel)) {
            return module;
        }
    }
    auto module = std::make_shared<Module>(context, kernel);
    module->loadFor(kernel);
    loaded.push_back(module);
    return module;
}

} // namespace tokred
