"""Ray schedules the workers of a CPU as if they were on GPUs: vLLM asks it for devices."""


def pretend_devices():
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.ray_device_key = "GPU"
