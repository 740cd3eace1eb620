// A compiled kernel and all that is needed to launch it: what the plugin's fields say.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace tokred {

// The fields of a node by name, as text: numbers stand apart by spaces. Plans hold the same.
using Fields = std::map<std::string, std::string>;

// Element types by the names that the fields use.
enum class Type {
    fp32,
    fp16,
    bf16,
    i32,
    i1
};

struct Kernel {
    // Throws std::invalid_argument, naming the field that is missing, wrong, or contradicted by
    // the PTX.
    explicit Kernel(Fields given);

    // What a plan keeps, and back; throws std::invalid_argument on anything else.
    std::string serialize() const;
    static Kernel deserialize(void const* data, size_t size);

    std::string const& ptx() const { return fields.at("ptx"); }

    // Bytes of global memory that a launch needs besides its tensors.
    size_t workspace(int64_t batch) const;

    Fields fields;
    std::string name;            // for messages
    std::string entry;           // of the PTX
    int32_t target{};            // compute capability times ten
    bool targetOnly{};           // the PTX uses what other GPUs lack, newer ones included
    std::string ptxVersion;      // for messages
    int32_t grid[2]{};           // blocks along x and y; z is the batch
    int32_t block{};             // threads
    int32_t shared{};            // bytes of dynamic shared memory
    int32_t scratch{};           // bytes of global memory for each block of the grid
    std::vector<Type> inputs;    // parameters of the entry: inputs,
    std::vector<int32_t> extras; // then these numbers,
    std::vector<Type> outputs;   // then outputs, and last the scratch memory, if any
    std::vector<std::vector<int32_t>> outputDims; // without the batch

private:
    void readPtx();
    void readOutputDims();
};

} // namespace tokred
