# shellcheck shell=bash
# Sourced by local.sh: what JAX and libtpu read from the environment, chosen for the devices here, unless it is set already.
# The caller may set $devices, the folder in which devices show.

devices="${devices:-/dev}"

# JAX takes 0.75 of a GPU unless told otherwise. Its older name counts too: JAX refuses both together.
if compgen -G "$devices/nvidia[0-9]*" >/dev/null && [ -z "${XLA_CLIENT_MEM_FRACTION:-}${XLA_PYTHON_CLIENT_MEM_FRACTION:-}" ]; then
  export XLA_CLIENT_MEM_FRACTION=0.92
fi

# More of a core's own memory for fused matmuls; TPUs v6e and newer have more of it.
if compgen -G "$devices/accel*" >/dev/null || compgen -G "$devices/vfio/[0-9]*" >/dev/null; then
  about=http://metadata.google.internal/computeMetadata/v1/instance/attributes/accelerator-type
  tpu="${TPU_ACCELERATOR_TYPE:-$(curl -sf -m 2 -H 'Metadata-Flavor: Google' "$about" 2>/dev/null || true)}"
  case "$tpu" in
    v6e* | tpu7x*) vmem_kib=98304 ;;
    *) vmem_kib=50000 ;;
  esac
  export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS-"--xla_tpu_scoped_vmem_limit_kib=$vmem_kib"}"
fi

for name in XLA_CLIENT_MEM_FRACTION XLA_PYTHON_CLIENT_MEM_FRACTION LIBTPU_INIT_ARGS; do
  if [ -n "${!name:-}" ]; then echo "launch: $name=${!name}"; fi
done
