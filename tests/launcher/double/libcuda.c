// A CUDA driver without a GPU. It writes one line a call to the file CUDA_RECORD, beside it the
// code of each module (CUDA_RECORD.<module>), and behaves as it is told by
//
//   CUDA_SM       compute capability times ten
//   CUDA_FAIL     "cuLaunchKernel=719 ...": calls that fail, and with what
//   CUDA_JIT_LOG  what the compiler says when a module does not load
//
// Like the real one it knows which context a module is of, and reads as many arguments of a
// launch as the code has parameters.
#include <cuda.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MODULES = 4096, CONTEXTS = 3, DEEP = 8 };

struct CUctx_st {
    int number, destroyed;
};
struct CUmod_st {
    int number;
    struct CUctx_st* context;
    char* code;
    char parameters[64]; // 8 or 4: bytes of each
};

static struct CUctx_st contexts[CONTEXTS] = {{0, 0}, {1, 0}, {2, 0}};
static struct CUmod_st modules[MODULES];
static int used, gone;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread struct CUctx_st* stack[DEEP];
static __thread int top = -1; // -1: the thread has not said anything, and has context 1

static void leave(void) { gone = 1; }

static struct CUctx_st* current(void) {
    if (top < 0) {
        top = 0;
        stack[0] = &contexts[1];
    }
    return stack[top];
}

static void record(char const* line) {
    FILE* file = fopen(getenv("CUDA_RECORD"), "a");
    fprintf(file, "%s\n", line);
    fclose(file);
}

// Writes the call down; what it is told to fail with, or else 0.
static CUresult enter(char const* name, char const* more) {
    static int first = 1;
    char line[1024];
    if (gone) {
        return CUDA_ERROR_DEINITIALIZED;
    }
    pthread_mutex_lock(&lock);
    if (first) {
        first = 0;
        atexit(leave);
    }
    snprintf(line, sizeof line, "%s%s%s", name, more[0] ? " " : "", more);
    record(line);
    pthread_mutex_unlock(&lock);
    char const* told = getenv("CUDA_FAIL");
    snprintf(line, sizeof line, "%s=", name);
    char const* found = told == NULL ? NULL : strstr(told, line);
    return found == NULL ? CUDA_SUCCESS : (CUresult)atoi(found + strlen(line));
}

static int valid(CUcontext context) {
    return context != NULL && !context->destroyed;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    CUresult status = enter("cuCtxGetCurrent", "");
    *context = current();
    return status;
}

CUresult cuCtxSetCurrent(CUcontext context) { // for the test, by number
    current();
    stack[top] = context == NULL ? NULL : &contexts[(intptr_t)context];
    return CUDA_SUCCESS;
}

CUresult cuCtxDestroy_v2(CUcontext context) { // for the test, by number
    contexts[(intptr_t)context].destroyed = 1;
    return CUDA_SUCCESS;
}

#ifndef WITHOUT_PUSH
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    CUresult status = enter("cuCtxPushCurrent", "");
    if (status == CUDA_SUCCESS && !valid(context)) {
        status = CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
    if (status == CUDA_SUCCESS) {
        current();
        stack[++top] = context;
    }
    return status;
}
#endif

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    CUresult status = enter("cuCtxPopCurrent", "");
    *context = stack[top--];
    return status;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    *device = 0;
    CUresult status = enter("cuCtxGetDevice", "");
    return status != CUDA_SUCCESS || valid(current()) ? status : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
    (void)device;
    snprintf(name, (size_t)size, "Pretended GPU");
    return enter("cuDeviceGetName", "");
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    int sm = atoi(getenv("CUDA_SM"));
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? sm / 10 : sm % 10;
    return enter("cuDeviceGetAttribute", "");
}

CUresult cuDriverGetVersion(int* version) {
    *version = 12020;
    return enter("cuDriverGetVersion", "");
}

CUresult cuGetErrorString(CUresult error, char const** text) {
    static __thread char made[32];
    snprintf(made, sizeof made, "error text %d", (int)error);
    *text = error == CUDA_ERROR_UNKNOWN ? NULL : made; // it does not know all of them
    return enter("cuGetErrorString", "");
}

CUresult cuModuleLoadDataEx(CUmodule* module, void const* image, unsigned count,
    CUjit_option* options, void** values) {
    char more[64], path[1024];
    char const* log = getenv("CUDA_JIT_LOG");
    pthread_mutex_lock(&lock);
    struct CUmod_st* made = &modules[++used];
    made->number = used;
    pthread_mutex_unlock(&lock);
    snprintf(more, sizeof more, "module=%d context=%d", made->number, current()->number);
    CUresult status = enter("cuModuleLoadDataEx", more);
    if (status != CUDA_SUCCESS) {
        if (log != NULL && count == 2 && options[0] == CU_JIT_ERROR_LOG_BUFFER
            && options[1] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES) {
            // The real driver fills what it is given to the last byte.
            strncpy(values[0], log, (size_t)values[1]);
        }
        *module = (CUmodule)8; // of no use to anyone
        return status;
    }
    made->context = current();
    made->code = strdup(image);
    snprintf(path, sizeof path, "%s.%d", getenv("CUDA_RECORD"), made->number);
    FILE* file = fopen(path, "w");
    fputs(image, file);
    fclose(file);
    *module = made;
    return status;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, char const* name) {
    char more[256], entry[256];
    snprintf(more, sizeof more, "module=%d %s", module->number, name);
    CUresult status = enter("cuModuleGetFunction", more);
    snprintf(entry, sizeof entry, ".entry %s(", name);
    char* at = strstr(module->code, entry);
    if (status != CUDA_SUCCESS || at == NULL) {
        return status != CUDA_SUCCESS ? status : CUDA_ERROR_NOT_FOUND;
    }
    char* end = strchr(at, ')');
    int count = 0;
    while ((at = strstr(at, ".param .u")) != NULL && at < end) {
        at += strlen(".param .u");
        module->parameters[count++] = (char)(atoi(at) / 8);
    }
    *function = (CUfunction)module;
    return status;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    char more[64];
    snprintf(more, sizeof more, "module=%d %s=%d", ((CUmodule)function)->number,
        attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES ? "shared" : "other", value);
    return enter("cuFuncSetAttribute", more);
}

CUresult cuLaunchKernel(CUfunction function, unsigned gridX, unsigned gridY, unsigned gridZ,
    unsigned blockX, unsigned blockY, unsigned blockZ, unsigned shared, CUstream stream,
    void** arguments, void** extra) {
    CUmodule module = (CUmodule)function;
    char more[900];
    int at = snprintf(more, sizeof more,
        "module=%d grid=%u,%u,%u block=%u,%u,%u shared=%u stream=%d arguments=", module->number,
        gridX, gridY, gridZ, blockX, blockY, blockZ, shared, (int)(intptr_t)stream);
    for (int i = 0; module->parameters[i] && extra == NULL; ++i) {
        char* end = more + at;
        size_t left = sizeof more - (size_t)at;
        if (module->parameters[i] == 8) {
            unsigned long long pointer;
            memcpy(&pointer, arguments[i], sizeof pointer);
            at += snprintf(end, left, "%s0x%llx", i ? "," : "", pointer);
        } else {
            int32_t number;
            memcpy(&number, arguments[i], sizeof number);
            at += snprintf(end, left, "%s%d", i ? "," : "", number);
        }
    }
    CUresult status = enter("cuLaunchKernel", more);
    return status != CUDA_SUCCESS || current() == module->context ? status
                                                                  : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuModuleUnload(CUmodule module) {
    char more[64];
    snprintf(more, sizeof more, "module=%d", module->number);
    CUresult status = enter("cuModuleUnload", more);
    if (status == CUDA_SUCCESS && current() != module->context) {
        record("a module was unloaded in another context than its own");
        return CUDA_ERROR_INVALID_HANDLE;
    }
    free(module->code);
    module->code = NULL;
    return status;
}
