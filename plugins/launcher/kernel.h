// A compiled kernel and all that is needed to launch it: what the plugin's fields say.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace tokred
{

// Element types by the names that the fields use. Values are written into plans: only append.
enum class Type : int32_t
{
    fp32,
    fp16,
    bf16,
    i32,
    i1
};

// Throws std::invalid_argument on a name it does not know.
Type parseType(std::string const& name);

// "fp16 i32" -> types, in order.
std::vector<Type> parseTypes(std::string const& names);

// "2048 32" -> numbers; text, because a node cannot have an empty list.
std::vector<int32_t> parseNumbers(std::string const& numbers);

// Throws std::invalid_argument where the fields contradict each other.
struct Kernel
{
    std::string name;                      // for messages and layer names
    int32_t target{};                      // compute capability times ten
    std::string ptx;
    std::string entry;                     // of the PTX
    int32_t grid[2]{};                     // blocks along x and y; z is the batch
    int32_t block{};                       // threads
    int32_t shared{};                      // bytes of dynamic shared memory
    std::vector<Type> inputs;
    std::vector<int32_t> extras;           // passed between inputs and outputs
    std::vector<Type> outputs;
    std::vector<std::vector<int32_t>> outputDims; // without the batch

    void check() const;
    std::string serialize() const;
    static Kernel deserialize(void const* data, size_t size);
};

} // namespace tokred
