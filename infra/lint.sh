#!/usr/bin/env bash
# Check docker/ and infra/: every tool on everything it understands, nothing written but build/infra.
#
#   infra/lint.sh [STEP]...     all steps, or some of: shell yaml docker compose kubernetes terraform policy
#
# `make lint-infra` makes the tools' environment, .venv-infra, first; Kustomize is the one inside kubectl.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH="$PWD/.venv-infra/bin:$PATH"
rendered=build/infra
# Kinds of operators, which the schemas of Kubernetes do not hold; trainer_syntax.py knows the second.
custom='ExternalSecret|TrainingRuntime'

say() { printf 'lint-infra  %s\n' "$*" >&2; }

render() {
    local overlay
    mkdir -p "$rendered"
    for overlay in infra/kubernetes/overlays/*/; do
        kubectl kustomize "$overlay" >"$rendered/$(basename "$overlay").yaml"
    done
}

step_shell() { shellcheck infra/*.sh infra/local/*.sh docker/*.sh tests/bench/*.sh .ci/run; }

step_yaml() { yamllint --strict .yamllint.yaml infra docker crane_core/presets; }

step_docker() { hadolint --failure-threshold info docker/*.Dockerfile; }

step_compose() { python infra/compose_syntax.py docker/compose.yaml; }

step_kubernetes() {
    local file report
    render
    for file in "$rendered"/*.yaml; do
        report="$(kubernetes-validate --strict "$file" 2>&1)" || { printf '%s\n' "$report" >&2; return 1; }
        if grep -E "^(WARN|ERROR)" <<<"$report" | grep -vE "find schema for kind ($custom) "; then
            return 1
        fi
    done
    python infra/trainer_syntax.py "$rendered"/*.yaml
}

step_terraform() {
    python infra/terraform_syntax.py infra/terraform
    if command -v terraform >/dev/null; then
        terraform fmt -check -diff infra/terraform
    fi
}

step_policy() {
    render
    local checkov=(checkov --skip-download --quiet --compact)
    "${checkov[@]}" --directory docker --framework dockerfile
    "${checkov[@]}" --directory infra/terraform --framework terraform
    "${checkov[@]}" --directory "$rendered" --framework kubernetes
}

if [ $# -eq 0 ]; then
    set -- shell yaml docker compose kubernetes terraform policy
fi
trap 'say "$step: failed"' ERR
for step in "$@"; do
    "step_$step"
    say "$step: clean"
done
