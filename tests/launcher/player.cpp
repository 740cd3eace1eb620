// Plays TensorRT for the launcher plugin: loads the library as the plugin registry does, and calls
// plugins in the ways that its commands say.
//
//   player LIBRARY < COMMANDS    one command a line; prints what comes back and what is logged
#include <NvInfer.h>
#include <cstdlib>
#include <dlfcn.h>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

using namespace nvinfer1;

namespace {

struct Log final : ILogger, ILoggerFinder {
    void log(Severity severity, char const* text) noexcept override {
        std::cout << "log " << (severity == Severity::kERROR ? "error" : "other") << ": " << text
                  << std::endl;
    }
    ILogger* findLogger() override { return this; }
};

struct Size final : IDimensionExpr {
    explicit Size(int64_t size)
        : value(size) {}
    bool isConstant() const noexcept override { return value >= 0; }
    int64_t getConstantValue() const noexcept override { return value; }
    int64_t value; // -1: known at run time
};

struct Builder final : IExprBuilder {
    IDimensionExpr const* constant(int64_t value) noexcept override {
        made.push_back(std::make_unique<Size>(value));
        return made.back().get();
    }
    std::vector<std::unique_ptr<Size>> made;
};

// Plugins still here at the end are destroyed after the library's own static objects.
struct Plugins : std::map<std::string, IPluginV2DynamicExt*> {
    ~Plugins() {
        for (auto& [name, plugin] : *this) {
            plugin->terminate();
            plugin->destroy();
        }
    }
};

Log logger;
Plugins plugins;
IPluginCreator* creator;

std::string contents(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

// A file of fields: a line "NAME TYPE LENGTH", the data, a line feed, and so on.
IPluginV2* create(std::string const& path, char const* name) {
    std::ifstream file(path, std::ios::binary);
    std::vector<std::string> texts;
    std::vector<std::string> names;
    std::vector<std::pair<PluginFieldType, int32_t>> kinds;
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string field;
        int32_t type{};
        int32_t length{};
        words >> field >> type >> length;
        bool const text = type == static_cast<int32_t>(PluginFieldType::kCHAR);
        std::string data(text ? length : 4 * length, 0);
        file.read(data.data(), static_cast<std::streamsize>(data.size())).get();
        names.push_back(field);
        texts.push_back(data);
        kinds.emplace_back(static_cast<PluginFieldType>(type), length);
    }
    std::vector<PluginField> fields;
    for (size_t i = 0; i < names.size(); ++i) {
        fields.emplace_back(names[i].c_str(), texts[i].data(), kinds[i].first, kinds[i].second);
    }
    PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
    return creator->createPlugin(name, &collection);
}

void keep(std::string const& slot, IPluginV2* made) {
    std::cout << (made == nullptr ? "null" : "made") << std::endl;
    if (made != nullptr) {
        plugins[slot] = static_cast<IPluginV2DynamicExt*>(made);
    }
}

int32_t enqueue(IPluginV2DynamicExt& plugin, int64_t batch) {
    std::vector<PluginTensorDesc> tensors(16);
    tensors[0].dims.nbDims = 1;
    tensors[0].dims.d[0] = static_cast<std::remove_reference_t<decltype(Dims{}.d[0])>>(batch);
    std::vector<void const*> inputs;
    std::vector<void*> outputs;
    for (intptr_t i = 1; i <= 16; ++i) {
        inputs.push_back(reinterpret_cast<void*>(0xa00000000000 + i));
        outputs.push_back(reinterpret_cast<void*>(0xb00000000000 + i));
    }
    size_t const needed
        = plugin.getWorkspaceSize(tensors.data(), 16, tensors.data(), 16);
    if (needed > 0) {
        std::cout << "workspace " << needed << std::endl;
    }
    void* const workspace = needed > 0 ? reinterpret_cast<void*>(0xc00000000000) : nullptr;
    return plugin.enqueue(tensors.data(), tensors.data(), inputs.data(), outputs.data(), workspace,
        reinterpret_cast<cudaStream_t>(7));
}

void dims(IPluginV2DynamicExt& plugin, int32_t nbInputs) {
    Builder builder;
    Size const batch(-1);
    DimsExprs input{2, {&batch, builder.constant(5)}};
    std::vector<DimsExprs> const inputs(16, input);
    for (int32_t i = 0; i < plugin.getNbOutputs(); ++i) {
        auto const made = plugin.getOutputDimensions(i, inputs.data(), nbInputs, builder);
        std::cout << "dims";
        for (int32_t d = 0; d < made.nbDims; ++d) {
            auto const size = std::to_string(made.d[d]->getConstantValue());
            std::cout << " " << (made.d[d] == &batch ? "batch" : size);
        }
        std::cout << " type " << static_cast<int32_t>(plugin.getOutputDataType(i, nullptr, 0))
                  << std::endl;
    }
}

// For each tensor, what is taken of all types and formats: "type/format", LINEAR being 0.
void formats(IPluginV2DynamicExt& plugin, int32_t nbInputs, int32_t nbOutputs) {
    for (int32_t position = 0; position < nbInputs + nbOutputs; ++position) {
        std::vector<PluginTensorDesc> tensors(nbInputs + nbOutputs);
        std::string taken = "takes";
        for (int32_t type = 0; type < 8; ++type) {
            for (int32_t format = 0; format < 4; ++format) {
                tensors[position].type = static_cast<DataType>(type);
                tensors[position].format = static_cast<TensorFormat>(format);
                if (plugin.supportsFormatCombination(
                        position, tensors.data(), nbInputs, nbOutputs)) {
                    taken += " " + std::to_string(type) + "/" + std::to_string(format);
                }
            }
        }
        std::cout << taken << std::endl;
    }
}

// Threads that each run a clone of their own over and over, as execution contexts come and go.
void race(IPluginV2DynamicExt& plugin, int32_t threads) {
    std::vector<std::thread> running;
    for (int32_t i = 0; i < threads; ++i) {
        running.emplace_back([&plugin] {
            for (int32_t round = 0; round < 25; ++round) {
                auto* mine = plugin.clone();
                if (mine->initialize() != 0 || enqueue(*mine, 1) != 0) {
                    std::cout << "a thread failed" << std::endl;
                }
                mine->terminate();
                mine->destroy();
            }
        });
    }
    for (auto& thread : running) {
        thread.join();
    }
}

void obey(std::string const& command, std::istringstream& words) {
    std::string slot;
    std::string argument;
    words >> slot >> argument;
    int32_t const number = std::atoi(argument.c_str());
    if (command == "create") {
        return keep(slot, create(argument, slot.c_str()));
    }
    if (command == "deserialize") {
        std::string const bytes = contents(argument);
        std::vector<char> const exact(bytes.begin(), bytes.end()); // no NUL behind it
        return keep(slot, creator->deserializePlugin(slot.c_str(), exact.data(), exact.size()));
    }
    if (command == "context" || command == "destroy_context") {
        auto const* name = command == "context" ? "cuCtxSetCurrent" : "cuCtxDestroy_v2";
        auto* call = reinterpret_cast<int (*)(intptr_t)>(
            dlsym(dlopen("libcuda.so.1", RTLD_NOW), name));
        call(std::atoi(slot.c_str()));
        return;
    }
    if (command == "tell") {
        setenv(slot.c_str(), argument.c_str(), 1);
        return;
    }
    IPluginV2DynamicExt& plugin = *plugins.at(slot);
    if (command == "clone") {
        keep(argument, plugin.clone());
    } else if (command == "initialize") {
        std::cout << plugin.initialize() << std::endl;
    } else if (command == "enqueue") {
        std::cout << enqueue(plugin, std::atoll(argument.c_str())) << std::endl;
    } else if (command == "terminate") {
        plugin.terminate();
    } else if (command == "destroy") {
        plugin.destroy();
        plugins.erase(slot);
    } else if (command == "destroy_in_thread") {
        // One that never had a context.
        std::thread([&] {
            auto* call = reinterpret_cast<int (*)(intptr_t)>(
                dlsym(dlopen("libcuda.so.1", RTLD_NOW), "cuCtxSetCurrent"));
            call(0);
            plugin.terminate();
            plugin.destroy();
        }).join();
        plugins.erase(slot);
    } else if (command == "serialize") {
        std::vector<char> bytes(plugin.getSerializationSize());
        plugin.serialize(bytes.data());
        std::ofstream(argument, std::ios::binary).write(bytes.data(), bytes.size());
    } else if (command == "dims") {
        dims(plugin, number);
    } else if (command == "formats") {
        int32_t nbOutputs{};
        words >> nbOutputs;
        formats(plugin, number, nbOutputs);
    } else if (command == "race") {
        race(plugin, number);
    } else {
        std::cout << "unknown command " << command << std::endl;
    }
}

} // namespace

int main(int argc, char** argv) {
    void* library = argc == 2 ? dlopen(argv[1], RTLD_NOW) : nullptr;
    if (library == nullptr) {
        std::cout << dlerror() << std::endl;
        return 2;
    }
    auto* setLogger = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    auto* getCreators = reinterpret_cast<IPluginCreator* const* (*)(int32_t&)>(
        dlsym(library, "getPluginCreators"));
    setLogger(&logger);
    int32_t count = 0;
    creator = getCreators(count)[0];
    std::cout << count << " " << creator->getPluginNamespace() << "::" << creator->getPluginName()
              << " " << creator->getPluginVersion();
    auto const& fields = *creator->getFieldNames();
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        PluginField const& field = fields.fields[i];
        std::cout << " " << field.name << "=" << static_cast<int32_t>(field.type);
    }
    std::cout << std::endl;
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream words(line);
        std::string command;
        words >> command;
        obey(command, words);
    }
    return 0;
}
