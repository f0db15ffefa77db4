# Starting and ending the cluster's servers. Sourced by ./cluster.
# shellcheck shell=bash disable=SC2154 # variables of ./cluster and programs.sh

run() { # run NAME COMMAND...: start a server, remember its pid, keep its log
  local name=$1; shift
  setsid nohup "$@" >"$home/log/$name.log" 2>&1 </dev/null 9>&- &
  echo $! >"$home/pid/$name"
}

ours() { # ours NAME: does this server run? Every command line names the cluster's folder, so a pid from before a reboot is not taken for ours
  local pid; pid=$(cat "$home/pid/$1" 2>/dev/null) && grep -qF "$home/" "/proc/$pid/cmdline" 2>/dev/null
}

alive() {
  local file
  [ -e "$home/pid/coredns" ] || return 1
  for file in "$home"/pid/*; do ours "${file##*/}" || return 1; done
  wait_for 60 kubectl get --raw /readyz 2>/dev/null # a busy machine's may be late
}

port_holders() { # pids of programs that are not ours on ports that we need
  local pid line
  for pid in $(ss -Hltnp '( sport = :2379 or sport = :5000 or sport = :6443 )' | grep -oE 'pid=[0-9]+' | sort -u); do
    line=$(tr '\0' ' ' 2>/dev/null <"/proc/${pid#pid=}/cmdline") || continue
    case $line in "" | *"$home/"*) ;; *) echo "${pid#pid=}" ;; esac # one that is ending has no command line any more
  done
}

wait_for() { # wait_for SECONDS COMMAND...
  local until=$((SECONDS + $1)); shift
  until "$@" >/dev/null 2>&1; do [ $SECONDS -lt $until ] || { echo "waited in vain for: $*" >&2; return 1; }; sleep 0.2; done
}

kubectl() { "$kubenode" kubectl --kubeconfig "$home/admin.kubeconfig" "$@"; }

certificate() ( # certificate NAME SUBJECT ALTERNATIVE_NAMES
  cd "$home/pki"
  openssl req -newkey rsa:2048 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out "$1.crt" -extfile <(echo "subjectAltName=$3") 2>/dev/null
)

identities() {
  openssl req -x509 -newkey rsa:2048 -nodes -keyout "$home/pki/ca.key" -out "$home/pki/ca.crt" -subj /CN=kubernetes-ca -days 3650 2>/dev/null
  openssl genrsa -out "$home/pki/sa.key" 2048 2>/dev/null
  certificate apiserver /CN=kube-apiserver "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:localhost,IP:$host_ip,IP:10.96.0.1"
  certificate kubelet /CN=kubelet "DNS:localhost,IP:127.0.0.1,IP:$host_ip"
  certificate kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client DNS:apiserver
  certificate front-proxy /CN=front-proxy-client DNS:front-proxy
  identity admin admin system:masters
  identity controller system:kube-controller-manager
  identity scheduler system:kube-scheduler
  identity proxy system:kube-proxy
  local n; for n in 1 2 3; do identity "node$n" "system:node:node$n" system:nodes; done
}

identity() { # identity NAME USER [GROUP]: a token that the API server knows, and a kubeconfig that holds it
  echo "$1-token,$2,$1${3:+,$3}" >>"$home/pki/tokens.csv"
  kubeconfig "$1" "$1-token"
}

kubeconfig() { # kubeconfig NAME TOKEN
  cat >"$home/$1.kubeconfig" <<K
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://$host_ip:6443", certificate-authority: $home/pki/ca.crt}}]
users: [{name: user, user: {token: $2}}]
contexts: [{name: test, context: {cluster: test, user: user, namespace: default}}]
current-context: test
K
}

room_for_one() { # fails, in words, where a cluster cannot be started now
  local holders; holders=$(port_holders)
  if [ ${#home} -gt 60 ]; then # sockets of containerd lie in it, and the path of a socket has at most 107 bytes
    echo "the path $home is too long; set CLUSTER to a shorter one" >&2
  elif [ -n "$holders" ]; then
    echo "ports 2379, 5000 or 6443 are taken. Another test cluster? Only one can run on a machine; CLUSTER tells which is meant:" >&2
    # shellcheck disable=SC2086 # a list of pids
    ps -o pid=,args= $holders | cut -c1-150 >&2
  else return 0; fi
  return 1
}

start_control_plane() {
  mkdir -p "$home"/{pki,log,pid,registry}
  identities
  # Containers may not raise their limits where the machine forbids it, so they ask for no more than any machine has.
  ctr oci spec | python3 -c 'import json, sys; spec = json.load(sys.stdin)
spec["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "hard": 2048, "soft": 1024}]; json.dump(spec, sys.stdout)' >"$home/spec.json"
  ip addr replace "$host_ip/32" dev lo
  sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.route_localnet=1
  start_api
  start_controllers
  start_proxy
  start_registry
  start_dns
}

start_api() {
  local pki=$home/pki
  run etcd etcd --data-dir "$home/etcd" --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 --log-level error
  run kube-apiserver "$kubenode" kube-apiserver --feature-gates="${CLUSTER_FEATURES:-}" --etcd-servers=http://127.0.0.1:2379 \
    --secure-port=6443 --bind-address="$host_ip" --advertise-address="$host_ip" --service-cluster-ip-range=10.96.0.0/16 \
    --authorization-mode=Node,RBAC --allow-privileged \
    --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" --client-ca-file="$pki/ca.crt" \
    --token-auth-file="$pki/tokens.csv" --service-account-issuer=https://kubernetes.default.svc \
    --service-account-key-file="$pki/sa.key" --service-account-signing-key-file="$pki/sa.key" \
    --kubelet-client-certificate="$pki/kubelet-client.crt" --kubelet-client-key="$pki/kubelet-client.key" \
    --kubelet-preferred-address-types=InternalIP --enable-aggregator-routing \
    --requestheader-client-ca-file="$pki/ca.crt" --requestheader-allowed-names=front-proxy-client \
    --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group \
    --requestheader-username-headers=X-Remote-User --proxy-client-cert-file="$pki/front-proxy.crt" --proxy-client-key-file="$pki/front-proxy.key"
  wait_for 60 kubectl get --raw /readyz
}

start_controllers() { # with more requests a second than the defaults allow, so that a thousand pods take seconds
  run kube-controller-manager "$kubenode" kube-controller-manager --feature-gates="${CLUSTER_FEATURES:-}" \
    --kubeconfig="$home/controller.kubeconfig" --leader-elect=false --use-service-account-credentials \
    --service-account-private-key-file="$home/pki/sa.key" --root-ca-file="$home/pki/ca.crt" \
    --cluster-signing-cert-file="$home/pki/ca.crt" --cluster-signing-key-file="$home/pki/ca.key" --horizontal-pod-autoscaler-sync-period=5s \
    --node-monitor-grace-period="${CLUSTER_NODE_GRACE:-60s}" --node-monitor-period=2s --kube-api-qps=200 --kube-api-burst=400
  run kube-scheduler "$kubenode" kube-scheduler --kubeconfig="$home/scheduler.kubeconfig" --leader-elect=false --kube-api-qps=200 --kube-api-burst=400
}

start_proxy() { # one for all nodes: they share this machine's network. Zeros leave alone what may be read-only here
  cat >"$home/proxy.yaml" <<C
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: $home/proxy.kubeconfig}
mode: iptables
clusterCIDR: 10.244.0.0/16
hostnameOverride: node1
nodePortAddresses: [127.0.0.0/8]
conntrack: {maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
oomScoreAdj: 0
C
  run kube-proxy "$kubenode" kube-proxy --config="$home/proxy.yaml"
}

start_registry() {
  cat >"$home/registry.yaml" <<C
version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: $home/registry}, delete: {enabled: true}}
http: {addr: "127.0.0.1:5000"}
C
  run registry docker-registry serve "$home/registry.yaml"
}

start_dns() { # a server of this machine; pods find it at 10.96.0.10
  cat >"$home/Corefile" <<C
.:1053 {
  bind $host_ip
  errors
  cache 2
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $home/admin.kubeconfig
    ttl 2
  }
  forward . /etc/resolv.conf
}
C
  run coredns "$kubenode" coredns -conf "$home/Corefile"
  kubectl apply -f - >/dev/null <<Y
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec: {clusterIP: 10.96.0.10, ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-host, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
ports: [{name: dns, port: 1053, protocol: UDP}, {name: dns-tcp, port: 1053, protocol: TCP}]
endpoints: [{addresses: [$host_ip]}]
Y
}

cgroup_roots() { # cgroup v2 has one tree, v1 one of each controller
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then echo /sys/fs/cgroup; return; fi
  local root
  for root in /sys/fs/cgroup/*/; do [ ! -f "$root/cgroup.procs" ] || echo "${root%/}"; done
}

make_cgroups() { # make_cgroups N: two kubelets on one root would delete each other's pods; a kubelet wants its root to be there
  local root controller name
  for root in $(cgroup_roots); do mkdir -p "$root/node$1"; done
  for controller in cpu cpuset memory pids; do
    [ ! -e /sys/fs/cgroup/cgroup.controllers ] || echo "+$controller" >/sys/fs/cgroup/cgroup.subtree_control
  done
  [ -d /sys/fs/cgroup/cpuset ] || return 0
  for name in cpus mems; do cat "/sys/fs/cgroup/cpuset/cpuset.$name" >"/sys/fs/cgroup/cpuset/node$1/cpuset.$name"; done
}

start_node() { # start_node N: a containerd and a kubelet of its own; pods get 10.244.N.0/24 on bridge cniN
  local n=$1 dir=$home/node$1 port=$((10250 + ($1 - 1) * 10))
  mkdir -p "$dir/cni" "$dir/certs.d/127.0.0.1:5000"
  make_cgroups "$n"
  cat >"$dir/cni/10-pods.conflist" <<C
{"cniVersion":"1.0.0","name":"pods$n","plugins":[
 {"type":"bridge","bridge":"cni$n","isGateway":true,"ipMasq":true,"hairpinMode":true,
  "ipam":{"type":"host-local","dataDir":"$dir/ipam","ranges":[[{"subnet":"10.244.$n.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
 {"type":"portmap","capabilities":{"portMappings":true}}]}
C
  printf 'server = "http://127.0.0.1:5000"\n[host."http://127.0.0.1:5000"]\n' >"$dir/certs.d/127.0.0.1:5000/hosts.toml"
  # Negative oom scores are refused on some machines. Namespaces and runc's state in the cluster's own folder can be found by `down`.
  cat >"$dir/containerd.toml" <<C
version = 2
root = "$dir/root"
state = "$dir/state"
[grpc]
  address = "$dir/containerd.sock"
[ttrpc]
  address = "$dir/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "$dir/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "$cni_plugins"
    conf_dir = "$dir/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    base_runtime_spec = "$home/spec.json"
    options.Root = "$dir/runc"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "$dir/certs.d"
C
  # Of a shared folder of logs, each kubelet removes once a minute those of pods that it does not know: the other's.
  cat >"$dir/kubelet.yaml" <<C
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: /node$n
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
address: $host_ip
port: $port
healthzPort: $((port - 2))
nodeStatusUpdateFrequency: 4s
nodeLeaseDurationSeconds: 8
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $home/pki/ca.crt}}
authorization: {mode: Webhook}
podLogsDir: $dir/logs
containerRuntimeEndpoint: unix://$dir/containerd.sock
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}
imageGCHighThresholdPercent: 99
imageGCLowThresholdPercent: 98
tlsCertFile: $home/pki/kubelet.crt
tlsPrivateKeyFile: $home/pki/kubelet.key
resolvConf: ""
C
  run "containerd$n" containerd -c "$dir/containerd.toml"
  wait_for 30 ctr -a "$dir/containerd.sock" version
  ctr -a "$dir/containerd.sock" -n k8s.io images import "$programs/pause.tar" >/dev/null
  run "kubelet$n" "$kubenode" kubelet --kubeconfig="$home/node$n.kubeconfig" --config="$dir/kubelet.yaml" \
    --root-dir="$dir/kubelet" --hostname-override="node$n" --node-ip="$host_ip"
}

kill_node() { # kill_node N: the kubelet, the runtime and every container stop at once
  local name pid root
  for name in "kubelet$1" "containerd$1"; do
    ! ours "$name" || kill -9 "$(cat "$home/pid/$name")" 2>/dev/null || true
    rm -f "$home/pid/$name"
  done
  for pid in $(pgrep -f "containerd-shim.*$home/node$1/" || true); do kill -9 "$pid" 2>/dev/null || true; done
  for root in $(cgroup_roots); do
    for pid in $(find "$root/node$1" -name cgroup.procs -exec cat {} + 2>/dev/null | sort -u); do kill -9 "$pid" 2>/dev/null || true; done
  done
}

end_servers() {
  [ -d "$home" ] || return 0
  local n file pid
  pid=$(cat "$home/guard" 2>/dev/null || true)
  [ -z "$pid" ] || [ "$pid" = $PPID ] || ! grep -qF "$cache/users" "/proc/$pid/cmdline" 2>/dev/null || kill "$pid" 2>/dev/null || true
  # What is left of an old state must not hurt a cluster that another folder has now.
  if [ -z "$(port_holders)" ]; then
    for n in 1 2 3; do [ ! -d "$home/node$n" ] || kill_node "$n"; done
  fi
  for file in "$home"/pid/*; do ! ours "${file##*/}" || kill "$(cat "$file")" 2>/dev/null || true; done
  for file in "$home"/pid/*; do # the API server hangs when etcd is gone before it
    wait_for 3 eval "! ours '${file##*/}'" 2>/dev/null || kill -9 "$(cat "$file")" 2>/dev/null || true
  done
  mount | awk -v home="$home/" 'index($3, home) == 1 {print $3}' | sort -r | while read -r file; do umount -l "$file"; done
  [ -n "$(port_holders)" ] || clean_machine
  rm -rf "$home" || true # `leftovers` tells
}

clean_machine() { # what kubelets, proxies and plugins leave in places that all clusters share
  local n file pod root
  for n in 1 2 3; do
    ip link delete "cni$n" 2>/dev/null || true
    for root in $(cgroup_roots); do find "$root/node$n" -depth -type d -exec rmdir {} + 2>/dev/null || true; done
  done
  for file in /run/containerd/s/*; do [ -n "$(ss -xlH src "$file")" ] || rm -f "$file"; done
  for file in /var/lib/cni/results/pods[123]-*-eth0; do
    pod=${file##*/pods?-}
    rm -f "$file" "/var/lib/cni/results/cni-loopback-${pod%-eth0}-lo"
  done
  iptables-save | sed -E '/KUBE-|CNI-/d' | iptables-restore
  ip6tables-save | sed -E '/KUBE-|CNI-/d' | ip6tables-restore
  ip addr del "$host_ip/32" dev lo 2>/dev/null || true
}

leftovers() { # what a cluster that was ended should not have left, one thing a line
  pgrep -af "^[^ ]*(kubenode|etcd|containerd|containerd-shim-runc-v2|docker-registry|coredns|operator|adapter|kwok|metrics-server) .*$home/" || true
  mount | grep -F " $home/" || true
  [ ! -e "$home" ] || echo "$home"
  [ -z "$(port_holders)" ] || return 0 # the rest is of the cluster that another folder has
  ip -o link | grep -oE 'cni[123]:' || true
  find $(cgroup_roots) -maxdepth 1 -name 'node[123]'
  { iptables-save; ip6tables-save; } | grep -E 'KUBE-|CNI-' || true
  ip -o addr show dev lo | grep -F " $host_ip/" || true
}
