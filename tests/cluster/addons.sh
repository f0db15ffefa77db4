# What a cluster that is up can be given: KEDA, metrics-server, Gateway API's kinds, nodes that only pretend. Sourced by ./cluster.
# shellcheck shell=bash disable=SC2154 # variables of ./cluster and programs.sh

keda_version=2.21.0
metrics_server_version=0.9.0
kwok_version=0.7.0
gateway_api_version=1.4.1

host_service() { # host_service NAMESPACE NAME PORT: a Service on port 443 whose only endpoint is a server of this machine
  cat <<Y
apiVersion: v1
kind: Service
metadata: {name: $2, namespace: $1}
spec: {ports: [{port: 443, targetPort: $3}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: $2-host, namespace: $1, labels: {kubernetes.io/service-name: $2}}
addressType: IPv4
ports: [{name: "", port: $3, protocol: TCP}]
endpoints: [{addresses: [$host_ip]}]
---
Y
}

aggregated_api() { # aggregated_api GROUP VERSION NAMESPACE SERVICE
  cat <<Y
apiVersion: apiregistration.k8s.io/v1
kind: APIService
metadata: {name: $2.$1}
spec:
  {group: $1, version: $2, groupPriorityMinimum: 100, versionPriority: 100, service: {name: $4, namespace: $3}, caBundle: $(base64 -w0 "$home/pki/ca.crt")}
---
Y
}

keda() { # operator and metrics API as servers of this machine, with the rights of their service account
  build "github.com/kedacore/keda/v2@v$keda_version" cmd/operator cmd/adapter
  local config=$bin/module/config tls=$home/keda
  mkdir -p "$tls"
  certificate keda /CN=keda "DNS:keda-metrics-apiserver.keda.svc,IP:127.0.0.1"
  cp "$home/pki/ca.crt" "$tls/ca.crt"; cp "$home/pki/keda.crt" "$tls/tls.crt"; cp "$home/pki/keda.key" "$tls/tls.key"
  kubectl apply --server-side -f "$config/crd/bases" -f "$config/general/namespace.yaml" -f "$config/service_account/service_account.yaml" \
    -f "$config/rbac/role.yaml" -f "$config/rbac/role_binding.yaml" -f "$config/metrics-server/role.yaml" -f "$config/metrics-server/role_binding.yaml" >/dev/null
  kubeconfig keda "$(kubectl create token keda-operator -n keda --duration=24h)"
  export KUBECONFIG=$home/keda.kubeconfig POD_NAMESPACE=keda KEDA_CLUSTER_OBJECT_NAMESPACE=keda WATCH_NAMESPACE=
  run keda-operator "$bin/operator" --cert-dir="$tls" --enable-webhook-patching=false --enable-apiservice-patching=false \
    --metrics-bind-address=127.0.0.1:9080 --health-probe-bind-address=127.0.0.1:9081 --metrics-service-bind-address=127.0.0.1:9666
  wait_for 60 curl -fs http://127.0.0.1:9081/readyz
  run keda-adapter "$bin/adapter" --bind-address="$host_ip" --secure-port=6444 --port=9082 --metrics-service-address=127.0.0.1:9666 \
    --cert-dir="$tls" --tls-cert-file="$tls/tls.crt" --tls-private-key-file="$tls/tls.key" --client-ca-file="$tls/ca.crt" \
    --authentication-kubeconfig="$KUBECONFIG" --authorization-kubeconfig="$KUBECONFIG" --lister-kubeconfig="$KUBECONFIG"
  unset KUBECONFIG
  { host_service keda keda-metrics-apiserver 6444; aggregated_api external.metrics.k8s.io v1beta1 keda keda-metrics-apiserver; } | kubectl apply -f - >/dev/null
  kubectl wait --for=condition=Available apiservice/v1beta1.external.metrics.k8s.io --timeout=60s >/dev/null
}

metrics() { # kubectl top, and autoscaling on CPU and memory
  build "sigs.k8s.io/metrics-server@v$metrics_server_version" cmd/metrics-server
  certificate metrics-server /CN=metrics-server DNS:metrics-server.kube-system.svc
  kubectl apply -n kube-system -f "$bin/module/manifests/base/rbac.yaml" >/dev/null
  kubeconfig metrics "$(kubectl create token metrics-server -n kube-system --duration=24h)"
  local config=$home/metrics.kubeconfig
  run metrics-server "$bin/metrics-server" --kubeconfig="$config" --authentication-kubeconfig="$config" --authorization-kubeconfig="$config" \
    --bind-address="$host_ip" --secure-port=6445 --tls-cert-file="$home/pki/metrics-server.crt" --tls-private-key-file="$home/pki/metrics-server.key" \
    --kubelet-certificate-authority="$home/pki/ca.crt" --kubelet-preferred-address-types=InternalIP --kubelet-use-node-status-port \
    --metric-resolution=10s --kubelet-request-timeout=5s
  { host_service kube-system metrics-server 6445; aggregated_api metrics.k8s.io v1beta1 kube-system metrics-server; } | kubectl apply -f - >/dev/null
  kubectl wait --for=condition=Available apiservice/v1beta1.metrics.k8s.io --timeout=60s >/dev/null
}

httproutes=$cache/httproutes-$gateway_api_version.yaml

fetch_gateway_api() {
  [ ! -s "$httproutes" ] || return 0
  install_go
  local module
  module=$(go mod download -json "sigs.k8s.io/gateway-api@v$gateway_api_version" | python3 -c 'import json, sys; print(json.load(sys.stdin)["Dir"])')
  cp "$module/config/crd/standard/gateway.networking.k8s.io_httproutes.yaml" "$httproutes.part" && mv "$httproutes.part" "$httproutes"
}

gateway_api() { # the kind HTTPRoute with its schema; nothing here routes
  fetch_gateway_api
  kubectl apply --server-side -f "$httproutes" >/dev/null
  wait_for 60 kubectl get httproutes.gateway.networking.k8s.io
}

fake_nodes() { # fake_nodes COUNT: pods that tolerate them are Running and Ready at once, and do nothing
  build "sigs.k8s.io/kwok@v$kwok_version" cmd/kwok
  ours kwok || run kwok "$bin/kwok" --kubeconfig="$home/admin.kubeconfig" --manage-all-nodes=false \
    --manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake --node-lease-duration-seconds=40 --cidr=10.100.0.0/16 --node-ip="$host_ip"
  local n; for n in $(seq "$1"); do cat <<Y; done | kubectl apply --server-side -f - >/dev/null
apiVersion: v1
kind: Node
metadata: {name: fake$n, annotations: {kwok.x-k8s.io/node: fake}, labels: {type: fake, kubernetes.io/hostname: fake$n}}
spec: {taints: [{key: kwok.x-k8s.io/node, value: fake, effect: NoSchedule}]}
status:
  allocatable: {cpu: 32, memory: 256Gi, pods: 110, nvidia.com/gpu: 8}
  capacity: {cpu: 32, memory: 256Gi, pods: 110, nvidia.com/gpu: 8}
---
Y
  kubectl wait --for=condition=Ready node -l type=fake --timeout=60s >/dev/null
}
