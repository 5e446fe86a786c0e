package integration

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// examined is what 'doctor --json' says of a check.
type examined struct{ Check, Result, Message, Mend string }

// doctor examines a host, and returns what was found by check, of several the worst.
func (h *host) doctor(flags ...string) map[string]examined {
	h.t.Helper()
	r := h.run(append([]string{"doctor", "--json"}, flags...)...)
	found := make(map[string]examined)
	failed := false
	for _, e := range parse[struct{ Checks []examined }](h.t, r.stdout).Checks {
		failed = failed || e.Result == "failed"
		of := (e.Check == "mounts" || e.Check == "loops") && e.Result != "ok"
		if of && !strings.Contains(e.Message, h.dir) {
			e = examined{Check: e.Check, Result: "ok"} // another test's, of this moment
		}
		if was := found[e.Check]; was.Result == "" || was.Result == "ok" || e.Result == "failed" {
			found[e.Check] = e
		}
	}
	if want := map[bool]int{false: 0, true: 1}[failed]; r.code != want {
		h.t.Errorf("%s\nwant exit %d", r, want)
	}
	return found
}

// finds checks what the doctor found: of each check named the result and a part of
// what it says, as "failed: denied", and of all others that they did not fail.
func (h *host) finds(want map[string]string, flags ...string) map[string]examined {
	h.t.Helper()
	found := h.doctor(flags...)
	for name, e := range found {
		expected, named := want[name]
		result, says, _ := strings.Cut(expected, ": ")
		if named && (e.Result != result || !strings.Contains(e.Message+"\n"+e.Mend, says)) || !named && e.Result == "failed" {
			h.t.Errorf("%+v, want %q", e, expected)
		}
	}
	for name := range want {
		if _, there := found[name]; !there {
			h.t.Errorf("there is no check %s", name)
		}
	}
	return found
}

func TestDoctorFindsAHealthyHostHealthyAndLeavesItSo(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	h.finds(map[string]string{"state": "ok: not there yet", "store": "ok: answers in", "format": "ok: ", "writes": "ok: honoured"})
	if _, err := os.Stat(h.state); err == nil {
		t.Error("it made the state directory")
	}
	h.finds(map[string]string{"store": "ok: not there yet", "format": "skipped: "}, "--store", "")

	vol := h.ok("volume", "create", "--size", "8MiB")
	m := h.mount(vol)
	m.write([]byte("dirty"), 0)
	before := entries(t, h.state)
	found := h.finds(map[string]string{
		"kernel": "ok: ", "fuse": "ok: ", "fusermount3": "skipped: ", "loop": "ok: ", "state": "ok: ", "volumes": "ok: 1",
		"mounts": "ok: ", "key": "skipped: ", "credentials": "ok: " + s.server.AccessKey, "clock": "ok: ", "versions": "ok: ",
	})
	if e := found["credentials"]; strings.Contains(e.Message, s.server.SecretKey) {
		t.Errorf("it shows the secret: %+v", e)
	}
	h.finds(map[string]string{"volumes": "warning: lazyvol snapshot create " + vol}, "--dirty-age", "1ns")
	if after := entries(t, h.state); strings.Join(before, " ") != strings.Join(after, " ") || len(s.objects(t, "probe")) > 0 {
		t.Errorf("it left %v of %v, and %v", after, before, s.objects(t, "probe"))
	}
	if r := h.run("doctor"); !strings.Contains(r.stdout, "ok       fuse         /dev/fuse can be opened\n") {
		t.Error(r)
	}
	h.fails(2, nil, "doctor", "now")
}

// mend does what the doctor says is to be done, which is in quotes.
func (h *host) mend(e examined) {
	h.t.Helper()
	for i, command := range strings.Split(e.Mend, "'") {
		if i%2 == 0 {
			continue
		}
		cmd := exec.Command("sh", "-c", command)
		cmd.Env = append(h.command(h.t.Context()).Env, "PATH="+filepath.Dir(h.binary)+":"+os.Getenv("PATH"))
		if out, err := cmd.CombinedOutput(); err != nil {
			h.t.Errorf("%s: %v\n%s", command, err, out)
		}
	}
}

func TestDoctorFindsWhatIsWrongWithTheStateDirectory(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	h.ok("volume", "create", "--size", "1MiB")
	if err := os.Chmod(h.state, 0o755); err != nil {
		t.Fatal(err)
	}
	h.mend(h.finds(map[string]string{"state": "warning: 0755"})["state"])
	h.finds(map[string]string{"state": "ok: ", "filesystem": "ok: ", "format": "ok: ", "writes": "ok: "})

	if err := os.Chown(h.state, 4711, -1); err != nil {
		t.Fatal(err)
	}
	h.finds(map[string]string{"state": "warning: user 4711"})
	user := *h
	user.user = &syscall.Credential{Uid: nobody, Gid: nobody}
	user.dir = "/" // which it may enter
	user.finds(map[string]string{"state": "failed: ", "filesystem": "failed: ", "volumes": "failed: ", "sessions": "failed: ", "space": "failed: ",
		"fusermount3": "ok: setuid", "loop": "skipped: ", "credentials": "failed: rights to the folder", "writes": "skipped: "})
	if err := os.Chown(h.state, 0, -1); err != nil {
		t.Fatal(err)
	}

	mount := func(flags uintptr) {
		if err := unix.Mount(h.state, h.state, "", flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	mount(unix.MS_BIND)
	t.Cleanup(func() {
		if err := unix.Unmount(h.state, 0); err != nil {
			t.Error(err)
		}
	})
	mount(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY)
	h.finds(map[string]string{"state": "failed: read-only", "filesystem": "failed: read-only", "volumes": "ok: 1", "writes": "warning: not written"})

	memory := newHost(t, nil)
	if err := os.MkdirAll(memory.state, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", memory.state, "tmpfs", 0, "size=512k,mode=700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(memory.state, 0); err != nil {
			t.Error(err)
		}
	})
	memory.finds(map[string]string{"filesystem": "failed: no space", "space": "failed: 512 KiB"})
	if left := entries(t, memory.state); len(left) > 0 {
		t.Errorf("it left %v", left)
	}
}

func TestDoctorFindsWhatIsWrongWithTheStore(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	before := len(s.objects(t, ""))
	as := func(env []string) *host { other := newHost(t, s); other.env = env; return other }

	as(s.server.EnvFor(s.server.AccessKey, "wrong")).finds(map[string]string{
		"store": "ok: refuses", "credentials": "failed: denied", "format": "skipped: ", "writes": "skipped: ", "clock": "ok: ", "fuse": "ok: "})
	as(s.server.EnvFor("nobody", "wrong")).finds(map[string]string{"credentials": "failed: nobody"})
	as(append(s.env, "AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=")).finds(map[string]string{"store": "skipped: ", "credentials": "failed: AWS_PROFILE", "writes": "skipped: "})
	as(s.server.EnvFor(s.server.ReadOnlyUser(t, s.bucket))).finds(map[string]string{"credentials": "ok: ", "format": "ok: ", "writes": "warning: not made"})
	empty := s.server.NewBucket(t)
	access, secret := s.server.NewUser(t)
	s.server.SetPolicy(t, s.bucket, iamPolicy{"2012-10-17", []iamStatement{
		{Effect: "Allow", Action: []string{"s3:ListBucket"}, Resource: []string{"arn:aws:s3:::my-bucket"}},
		{Effect: "Allow", Action: []string{"s3:GetObject", "s3:PutObject"}, Resource: []string{"arn:aws:s3:::my-bucket/*"}},
	}}.forBucket(t, s.bucket, access))
	as(s.server.EnvFor(access, secret)).finds(map[string]string{"credentials": "ok: ", "format": "ok: ", "writes": "ok: not delete"})
	h.finds(map[string]string{"store": "ok: ", "format": "failed: lazyvol init", "writes": "ok: "}, "--store", s.server.URL(empty, "p"))
	h.finds(map[string]string{"store": "failed: make the bucket", "writes": "skipped: "}, "--store", "s3://no-such-bucket-here/p")
	h.finds(map[string]string{"store": "failed: zone", "writes": "skipped: "}, "--store", s.url+"?zone=7")
	if after := len(s.objects(t, "")); after != before {
		t.Errorf("%d objects became %d", before, after)
	}

	skewed := as(atEndpoint(s.env, behindClock(t, s.endpoint, -3*time.Minute)))
	skewed.finds(map[string]string{"clock": "warning: ahead of the store"})
	skewed.env = atEndpoint(s.env, behindClock(t, s.endpoint, time.Hour))
	skewed.finds(map[string]string{"clock": "failed: behind the store", "credentials": "skipped: clock", "fuse": "ok: "})

	careless := &carelessS3{objects: make(map[string][]byte)}
	server := httptest.NewServer(careless)
	t.Cleanup(server.Close)
	as(atEndpoint(s.env, server.URL)).finds(map[string]string{"store": "failed: NoSuchKey"}) // it lists nothing

	s.server.Stop()
	start := time.Now()
	h.finds(map[string]string{"store": "failed: refused", "credentials": "skipped: ", "clock": "skipped: ", "writes": "skipped: ", "fuse": "ok: ", "state": "ok: "})
	if took := time.Since(start); took > bounded {
		t.Errorf("it took %s", took)
	}
	s.server.Start(t)
}

// behindClock starts a proxy before a server that tells another time, and returns its
// address.
func behindClock(t *testing.T, endpoint string, off time.Duration) string {
	t.Helper()
	target, err := url.Parse(endpoint)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host // it is signed
		},
		ModifyResponse: func(r *http.Response) error {
			r.Header.Set("Date", time.Now().Add(off).UTC().Format(http.TimeFormat))
			return nil
		},
	})
	t.Cleanup(proxy.Close)
	return proxy.URL
}

func TestDoctorTellsOfVersionedBuckets(t *testing.T) {
	t.Parallel()
	server := blockstoretest.StartVersitygw(t, "--versioning-dir", t.TempDir())
	bucket := server.NewBucket(t)
	server.SetVersioned(t, bucket)
	h := newHost(t, &store{url: server.URL(bucket, "p"), env: server.Env()})
	// This server's versioned buckets ignore If-Match on what was deleted, so that 'init'
	// refuses them, too.
	h.finds(map[string]string{"versions": "warning: noncurrent", "format": "failed: lazyvol init", "writes": "failed: ignores If-Match"})
}

func TestWhatTheDoctorSaysMendsWhatAKilledDaemonLeft(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := randomBytes(1, 4*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", snap)
	h.attach(vol, "--no-hydrate")
	h.attached(vol).kill()
	dead := h.mount(snap)
	dead.kill()
	h.finds(map[string]string{"mounts": "failed: killed", "loops": "failed: losetup --detach", "sessions": "warning: " + snap, "volumes": "ok: "})
	h.mend(h.doctor()["loops"])
	h.mend(h.finds(map[string]string{"mounts": "failed: " + dead.dir, "loops": "ok: "})["mounts"])
	h.finds(map[string]string{"mounts": "ok: ", "loops": "ok: "})
	h.mount(vol).equals(disk)

	record := filepath.Join(h.state, "volumes", vol, "volume.json")
	good, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ content, want string }{{"{}", "failed: " + vol}, {string(good), "ok: "}} {
		if err := os.WriteFile(record, []byte(c.content), 0o600); err != nil {
			t.Fatal(err)
		}
		h.finds(map[string]string{"volumes": c.want})
	}
}

// A configuration file that all other commands refuse does not keep the doctor from telling
// so, and from going by the environment.
func TestDoctorTellsOfABadConfiguration(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := newHost(t, s)
	file := filepath.Join(h.dir, "config.toml")
	h.env = append(h.env, "LAZYVOL_CONFIG="+file)
	write := func(content string) {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("memroy = \"256MiB\"\n")
	h.fails(2, []string{"memroy"}, "snapshot", "list")
	h.finds(map[string]string{"config": "failed: memroy", "store": "ok: " + s.url, "format": "ok: "})
	write("memory = \"256MiB\"\n[snapshot.create]\nkey = \"file:///no/such/key\"\n")
	h.finds(map[string]string{"config": "ok: " + file, "memory": "ok: 256 MiB", "key": "failed: /no/such/key"})
}
