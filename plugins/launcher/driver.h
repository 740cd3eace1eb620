// Loading PTX and launching it through the CUDA driver, which is found at run time: the library
// can be built and loaded where there is none.
#pragma once

#include "kernel.h"

#include <memory>

namespace tokred
{

// A kernel loaded into the current context. Modules of equal PTX are loaded once and unloaded
// with their last user; the driver compiles each anew otherwise.
class LoadedKernel
{
public:
    // Throws std::runtime_error, saying which kernel, which GPU, and what the driver said.
    static std::shared_ptr<LoadedKernel> load(Kernel const& kernel);
    virtual ~LoadedKernel() = default;

    // Puts one launch on the stream; pointers are inputs then outputs. Throws std::runtime_error.
    virtual void launch(Kernel const& kernel, void const* const* inputs, void* const* outputs,
        int32_t batch, void* stream) const = 0;
};

} // namespace tokred
