#include "kernel.h"

#include <cstring>
#include <sstream>
#include <stdexcept>

namespace tokred
{
namespace
{

constexpr uint32_t kMagic = 0x544b4c31; // "TKL1": change it with the format

class Writer
{
public:
    template <typename T>
    void number(T value)
    {
        mBytes.append(reinterpret_cast<char const*>(&value), sizeof value);
    }
    void text(std::string const& value)
    {
        number<uint64_t>(value.size());
        mBytes += value;
    }
    template <typename T>
    void numbers(std::vector<T> const& values)
    {
        number<uint64_t>(values.size());
        for (T value : values)
        {
            number(static_cast<int32_t>(value));
        }
    }
    std::string take()
    {
        return std::move(mBytes);
    }

private:
    std::string mBytes;
};

class Reader
{
public:
    Reader(void const* data, size_t size)
        : mAt(static_cast<char const*>(data))
        , mLeft(size)
    {
    }
    template <typename T>
    T number()
    {
        T value{};
        std::memcpy(&value, step(sizeof value), sizeof value);
        return value;
    }
    std::string text()
    {
        auto const size = number<uint64_t>();
        return {step(size), static_cast<size_t>(size)};
    }
    template <typename T>
    std::vector<T> numbers()
    {
        auto const count = number<uint64_t>();
        if (count > mLeft / sizeof(int32_t))
        {
            throw std::invalid_argument("the plan's kernel description is cut short");
        }
        std::vector<T> values;
        for (uint64_t i = 0; i < count; ++i)
        {
            values.push_back(static_cast<T>(number<int32_t>()));
        }
        return values;
    }
    bool atEnd() const
    {
        return mLeft == 0;
    }

private:
    char const* step(uint64_t size)
    {
        if (size > mLeft)
        {
            throw std::invalid_argument("the plan's kernel description is cut short");
        }
        char const* at = mAt;
        mAt += size;
        mLeft -= size;
        return at;
    }
    char const* mAt;
    size_t mLeft;
};

void require(bool holds, std::string const& what)
{
    if (!holds)
    {
        throw std::invalid_argument(what);
    }
}

} // namespace

Type parseType(std::string const& name)
{
    char const* const names[] = {"fp32", "fp16", "bf16", "i32", "i1"};
    for (int32_t i = 0; i < 5; ++i)
    {
        if (name == names[i])
        {
            return static_cast<Type>(i);
        }
    }
    throw std::invalid_argument("unknown element type '" + name + "'");
}

std::vector<Type> parseTypes(std::string const& names)
{
    std::vector<Type> types;
    std::istringstream stream(names);
    for (std::string name; stream >> name;)
    {
        types.push_back(parseType(name));
    }
    return types;
}

std::vector<int32_t> parseNumbers(std::string const& numbers)
{
    std::vector<int32_t> values;
    std::istringstream stream(numbers);
    for (std::string word; stream >> word;)
    {
        size_t read = 0;
        values.push_back(std::stoi(word, &read));
        require(read == word.size(), "'" + word + "' is no number");
    }
    return values;
}

void Kernel::check() const
{
    require(!ptx.empty() && !entry.empty(), "field ptx or entry is missing");
    require(ptx.find(entry) != std::string::npos, "the PTX has no entry " + entry);
    require(target > 0, "field target is missing");
    require(grid[0] > 0 && grid[1] > 0, "field grid must have two positive numbers");
    require(block > 0 && block <= 1024, "field block must be 1 to 1024 threads");
    require(shared >= 0, "field shared is negative");
    require(!inputs.empty() && !outputs.empty(), "field input_types or output_types is missing");
    require(outputs.size() == outputDims.size(), "output_types and output_ranks differ in number");
    for (auto const& dims : outputDims)
    {
        require(dims.size() < 8, "an output has more than 8 dimensions");
        for (int32_t size : dims)
        {
            require(size >= 0, "an output has a negative size");
        }
    }
}

std::string Kernel::serialize() const
{
    Writer w;
    w.number(kMagic);
    w.text(name);
    w.number(target);
    w.text(ptx);
    w.text(entry);
    w.number(grid[0]);
    w.number(grid[1]);
    w.number(block);
    w.number(shared);
    w.numbers(inputs);
    w.numbers(extras);
    w.numbers(outputs);
    for (auto const& dims : outputDims)
    {
        w.numbers(dims);
    }
    return w.take();
}

Kernel Kernel::deserialize(void const* data, size_t size)
{
    Reader r(data, size);
    require(r.number<uint32_t>() == kMagic, "the plan was made by another version of this plugin");
    Kernel kernel;
    kernel.name = r.text();
    kernel.target = r.number<int32_t>();
    kernel.ptx = r.text();
    kernel.entry = r.text();
    kernel.grid[0] = r.number<int32_t>();
    kernel.grid[1] = r.number<int32_t>();
    kernel.block = r.number<int32_t>();
    kernel.shared = r.number<int32_t>();
    kernel.inputs = r.numbers<Type>();
    kernel.extras = r.numbers<int32_t>();
    kernel.outputs = r.numbers<Type>();
    for (size_t i = 0; i < kernel.outputs.size(); ++i)
    {
        kernel.outputDims.push_back(r.numbers<int32_t>());
    }
    require(r.atEnd(), "the plan's kernel description has something behind it");
    kernel.check();
    return kernel;
}

} // namespace tokred
