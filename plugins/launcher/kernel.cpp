#include "kernel.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace tokred {
namespace {

constexpr char kMagic[] = "tokred KernelLaunch 3"; // change the number with the format
constexpr char kCutShort[] = "the plan's kernel description is cut short";

void require(bool holds, std::string const& what) {
    if (!holds) {
        throw std::invalid_argument(what);
    }
}

std::string const& text(Fields const& fields, char const* name) {
    auto const found = fields.find(name);
    require(found != fields.end(), std::string("field ") + name + " is missing");
    return found->second;
}

std::string const& filled(Fields const& fields, char const* name) {
    std::string const& value = text(fields, name);
    require(!value.empty(), std::string("field ") + name + " is empty");
    return value;
}

std::vector<int32_t> numbers(Fields const& fields, char const* name) {
    std::vector<int32_t> values;
    std::istringstream stream(text(fields, name));
    for (std::string word; stream >> word;) {
        int32_t value{};
        char const* const end = word.data() + word.size();
        auto const read = std::from_chars(word.data(), end, value);
        require(read.ec == std::errc{} && read.ptr == end,
            std::string("field ") + name + " holds '" + word + "', expected 32-bit integers");
        values.push_back(value);
    }
    return values;
}

int32_t number(Fields const& fields, char const* name, int32_t least, int32_t most) {
    auto const values = numbers(fields, name);
    require(values.size() == 1 && values[0] >= least && values[0] <= most,
        std::string("field ") + name + " must be one number from " + std::to_string(least) + " to "
            + std::to_string(most));
    return values[0];
}

std::vector<Type> types(Fields const& fields, char const* name) {
    char const* const known[] = {"fp32", "fp16", "bf16", "i32", "i1"};
    std::vector<Type> values;
    std::istringstream stream(filled(fields, name));
    for (std::string word; stream >> word;) {
        auto const found = std::find(std::begin(known), std::end(known), word);
        require(found != std::end(known),
            std::string("field ") + name + " holds '" + word
                + "', expected fp32, fp16, bf16, i32 or i1");
        values.push_back(static_cast<Type>(found - std::begin(known)));
    }
    require(!values.empty(), std::string("field ") + name + " is empty");
    return values;
}

// The word behind a directive of the PTX that starts a line; empty where there is none.
std::string directive(std::string const& ptx, std::string const& name) {
    auto const at = ("\n" + ptx).find("\n" + name + " ");
    std::string word;
    if (at != std::string::npos) {
        std::istringstream(ptx.substr(at + name.size(), 64)) >> word;
    }
    return word;
}

void appendSized(std::string& bytes, std::string const& value) {
    uint64_t const size = value.size();
    bytes.append(reinterpret_cast<char const*>(&size), sizeof size);
    bytes += value;
}

// Takes what appendSized() wrote off the front of the bytes.
std::string takeSized(char const*& at, size_t& left) {
    uint64_t size{};
    require(left >= sizeof size, kCutShort);
    std::memcpy(&size, at, sizeof size);
    require(left - sizeof size >= size, kCutShort);
    std::string value(at + sizeof size, static_cast<size_t>(size));
    at += sizeof size + value.size();
    left -= sizeof size + value.size();
    return value;
}

} // namespace

Kernel::Kernel(Fields given)
    : fields(std::move(given))
    , name(filled(fields, "kernel"))
    , entry(filled(fields, "entry"))
    , target(number(fields, "target", 10, 9999))
    , block(number(fields, "block", 1, 1024))
    , shared(number(fields, "shared", 0, 1 << 30))
    , scratch(number(fields, "scratch", 0, 1 << 20))
    , inputs(types(fields, "input_types"))
    , extras(numbers(fields, "extras"))
    , outputs(types(fields, "output_types")) {
    auto const blocks = numbers(fields, "grid");
    // CUDA's limits: 2^31 - 1 along x, 65535 along y and z.
    require(blocks.size() == 2 && blocks[0] > 0 && blocks[1] > 0 && blocks[1] <= 65535,
        "field grid must be two positive numbers, the second at most 65535");
    std::copy(blocks.begin(), blocks.end(), grid);
    readPtx();
    readOutputDims();
}

void Kernel::readPtx() {
    std::string const& code = filled(fields, "ptx");
    ptxVersion = directive(code, ".version");
    // "sm_80" runs on newer GPUs too; a letter behind the digits ("sm_90a") means: nowhere else.
    std::string const sm = directive(code, ".target");
    std::string const expected = "sm_" + std::to_string(target);
    require(sm.compare(0, expected.size(), expected) == 0
            && sm.find_first_of("0123456789", expected.size()) == std::string::npos,
        "field target says " + expected + " and the PTX is for '" + sm + "'");
    targetOnly = sm.find_first_of("af", expected.size()) != std::string::npos;

    auto const start = code.find(".entry " + entry + "(");
    auto const end = code.find(')', start);
    require(start != std::string::npos && end != std::string::npos,
        "the PTX has no entry " + entry);
    // The driver reads an argument for each parameter, whether it was passed or not.
    size_t parameters = 0;
    for (auto at = code.find(".param", start); at < end; at = code.find(".param", at + 1)) {
        ++parameters;
    }
    size_t const passed
        = inputs.size() + extras.size() + outputs.size() + (scratch > 0 ? 1 : 0);
    require(parameters == passed,
        "entry " + entry + " of the PTX has " + std::to_string(parameters)
            + " parameters, and the fields name " + std::to_string(passed)
            + " inputs, extras, outputs and scratch memory");
}

size_t Kernel::workspace(int64_t batch) const {
    return static_cast<size_t>(scratch) * grid[0] * grid[1] * static_cast<size_t>(batch);
}

void Kernel::readOutputDims() {
    auto const ranks = numbers(fields, "output_ranks");
    auto const sizes = numbers(fields, "output_dims");
    require(ranks.size() == outputs.size(), "output_types and output_ranks differ in number");
    auto at = sizes.begin();
    for (int32_t rank : ranks) {
        require(rank >= 0 && rank <= 7, "field output_ranks must have numbers from 0 to 7");
        require(rank <= sizes.end() - at, "output_dims has fewer numbers than output_ranks says");
        outputDims.emplace_back(at, at + rank);
        at += rank;
    }
    require(at == sizes.end(), "output_dims has more numbers than output_ranks says");
    require(std::all_of(sizes.begin(), sizes.end(), [](int32_t size) { return size >= 0; }),
        "field output_dims has a negative size");
}

std::string Kernel::serialize() const {
    std::string bytes;
    appendSized(bytes, kMagic);
    for (auto const& [key, value] : fields) {
        appendSized(bytes, key);
        appendSized(bytes, value);
    }
    return bytes;
}

Kernel Kernel::deserialize(void const* data, size_t size) {
    auto const* at = static_cast<char const*>(data);
    std::string magic;
    appendSized(magic, kMagic);
    require(data != nullptr && size >= magic.size()
            && std::memcmp(data, magic.data(), magic.size()) == 0,
        "the plan was made by another version of this plugin: build the engine again");
    at += magic.size();
    size -= magic.size();
    Fields fields;
    while (size > 0) {
        std::string key = takeSized(at, size);
        fields[std::move(key)] = takeSized(at, size);
    }
    return Kernel(std::move(fields));
}

} // namespace tokred
