// Package suite runs containerd's own tests of a snapshotter on the plugin, through the client that
// containerd has for such plugins.
package suite

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"github.com/containerd/containerd/snapshots/testsuite"
	"google.golang.org/grpc"
)

const patience = 2 * time.Minute

var started int32

// start starts a plugin for one case: the cases run in parallel and use the same keys.
func start(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	name := fmt.Sprintf("case-%d", atomic.AddInt32(&started, 1))
	socket := filepath.Join(root, "socket")
	plugin := exec.Command(os.Getenv("PYTHON"), "-P", "-m", "snapd_native", "containerd",
		"--socket", socket, "--name", name)
	plugin.Stdout, plugin.Stderr = os.Stdout, os.Stderr
	if err := plugin.Start(); err != nil {
		return nil, nil, err
	}
	ended := make(chan error, 1)
	dialing, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	go func() {
		ended <- plugin.Wait()
		cancel()
	}()
	stop := func() error {
		plugin.Process.Signal(syscall.SIGTERM)
		return <-ended
	}
	connection, err := grpc.DialContext(dialing, "unix://"+socket, grpc.WithInsecure(), grpc.WithBlock())
	if err != nil {
		stop()
		return nil, nil, err
	}
	snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "snapd-native")
	return snapshotter, func() error {
		connection.Close()
		return stop()
	}, nil
}

func TestPlugin(t *testing.T) {
	testsuite.SnapshotterSuite(t, "snapd-native", start)
}
