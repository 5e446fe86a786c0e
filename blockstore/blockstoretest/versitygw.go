package blockstoretest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/blockstore"
)

// versitygw is the S3 server that tests use: a single binary under the Apache
// licence, whose conditional writes are exact.
var versitygw = program{
	pkg:      "github.com/versity/versitygw/cmd/versitygw@v1.8.0",
	variable: "LAZYVOL_VERSITYGW",
	names:    []string{"versitygw", "/opt/lvtools/versitygw"},
}

const (
	startAttempts = 5                // with different ports
	startTimeout  = 20 * time.Second // of one attempt; it takes 0.1 s on an idle machine
)

// S3Server is a versitygw that serves one directory on a loopback port. Its
// methods must be called from one goroutine at a time, Env and URL excepted.
type S3Server struct {
	Endpoint  string // http://127.0.0.1:port
	AccessKey string // of the root user, who may do everything
	SecretKey string

	// Dir holds the buckets as directories and their objects as files: tests
	// may look at them, and damage them.
	Dir string

	binary  string
	flags   []string // of the backend
	iamDir  string
	log     string
	process *serverProcess // nil while stopped
}

// StartVersitygw starts a server with an empty directory, waits until it
// answers, and stops it at the end of the test. The binary is $LAZYVOL_VERSITYGW,
// versitygw in $PATH, /opt/lvtools/versitygw, or is built once, which takes
// minutes, into the user's cache directory. A server that cannot be had fails
// the test: there is no skipping. Flags are more of those of its backend, posix.
func StartVersitygw(t testing.TB, flags ...string) *S3Server {
	t.Helper()
	binary := versitygw.find(t)
	dir := t.TempDir()
	s := &S3Server{
		AccessKey: "root" + rand.Text(), // random, so that no other server on this machine can be taken for this one
		SecretKey: rand.Text(),
		Dir:       filepath.Join(dir, "buckets"),
		binary:    binary,
		flags:     flags,
		iamDir:    filepath.Join(dir, "iam"),
		log:       filepath.Join(dir, "log"),
	}
	for _, d := range []string{s.Dir, s.iamDir} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	for range startAttempts {
		if s.Endpoint, err = freeEndpoint(); err != nil {
			t.Fatal(err)
		}
		if err = s.start(t.Context()); err == nil {
			break // else the port was taken meanwhile, perhaps
		}
	}
	if err != nil {
		t.Fatalf("start versitygw: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			if log, err := os.ReadFile(s.log); err == nil && len(log) > 0 {
				t.Logf("versitygw's log:\n%s", log)
			}
		}
		s.Stop()
	})
	return s
}

// Stop kills the server, as an outage does: connections are refused until Start.
func (s *S3Server) Stop() {
	if s.process != nil {
		s.process.kill()
		s.process = nil
	}
}

// Start starts a stopped server again, with the same address and objects.
func (s *S3Server) Start(t testing.TB) {
	t.Helper()
	if s.process != nil {
		t.Fatal("versitygw is running already")
	}
	if err := s.start(t.Context()); err != nil {
		t.Fatalf("start versitygw again: %v", err)
	}
}

// Freeze stops the server's process without ending it: connections are
// accepted by the kernel, and nothing answers until Thaw.
func (s *S3Server) Freeze(t testing.TB) {
	t.Helper()
	s.signal(t, syscall.SIGSTOP)
	// The signal is only asked for: threads on other cores go on for a moment.
	err := unix.Waitid(unix.P_PID, s.process.cmd.Process.Pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil)
	if err != nil {
		t.Fatalf("wait until versitygw stands still: %v", err)
	}
}

// Thaw ends Freeze.
func (s *S3Server) Thaw(t testing.TB) { s.signal(t, syscall.SIGCONT) }

func (s *S3Server) signal(t testing.TB, sig syscall.Signal) {
	t.Helper()
	if err := s.process.cmd.Process.Signal(sig); err != nil {
		t.Fatalf("signal versitygw: %v", err)
	}
}

// NewBucket makes an empty bucket and returns its name.
func (s *S3Server) NewBucket(t testing.TB) string {
	t.Helper()
	name := "test-" + strings.ToLower(rand.Text())
	if _, err := s.client().CreateBucket(t.Context(), &s3.CreateBucketInput{Bucket: &name}); err != nil {
		t.Fatalf("create bucket: %v", err)
	}
	return name
}

// URL returns what blockstore.Open takes for a bucket, given the server's Env.
func (s *S3Server) URL(bucket, prefix string) string { return "s3://" + bucket + "/" + prefix }

// Env returns the environment variables that make this server and its root user
// the AWS of a child process, whatever else the environment and the home
// directory say. Append them to os.Environ().
func (s *S3Server) Env() []string { return s.EnvFor(s.AccessKey, s.SecretKey) }

// EnvFor is Env with the credentials of another user.
func (s *S3Server) EnvFor(accessKey, secretKey string) []string {
	return []string{
		"AWS_ENDPOINT_URL=" + s.Endpoint,
		"AWS_ENDPOINT_URL_S3=" + s.Endpoint,
		"AWS_ACCESS_KEY_ID=" + accessKey,
		"AWS_SECRET_ACCESS_KEY=" + secretKey,
		"AWS_SESSION_TOKEN=",
		"AWS_REGION=us-east-1",
		"AWS_PROFILE=",
		"AWS_CONFIG_FILE=/dev/null",
		"AWS_SHARED_CREDENTIALS_FILE=/dev/null",
		"AWS_EC2_METADATA_DISABLED=true",
	}
}

// Store opens the store in a bucket as the root user.
func (s *S3Server) Store(t testing.TB, bucket, prefix string) blockstore.Store {
	t.Helper()
	return s.StoreFor(t, bucket, prefix, s.AccessKey, s.SecretKey)
}

// StoreFor opens the store in a bucket as another user.
func (s *S3Server) StoreFor(t testing.TB, bucket, prefix, accessKey, secretKey string) blockstore.Store {
	t.Helper()
	store, err := blockstore.NewS3(t.Context(), blockstore.S3Config{
		Bucket:      bucket,
		Prefix:      prefix,
		Region:      "us-east-1",
		Endpoint:    s.Endpoint,
		Credentials: credentials.NewStaticCredentialsProvider(accessKey, secretKey, ""),
	})
	if err != nil {
		t.Fatal(err)
	}
	return store
}

// ReadOnlyUser makes a user who may list a bucket and read its objects and
// nothing else, and returns the credentials. It replaces the bucket's policy, and
// so whom an earlier call made.
func (s *S3Server) ReadOnlyUser(t testing.TB, bucket string) (accessKey, secretKey string) {
	t.Helper()
	accessKey, secretKey = s.NewUser(t)
	s.SetPolicy(t, bucket, fmt.Sprintf(`{"Version": "2012-10-17", "Statement": [{
		"Effect": "Allow", "Principal": {"AWS": [%q]},
		"Action": ["s3:GetObject", "s3:ListBucket"],
		"Resource": ["arn:aws:s3:::%s", "arn:aws:s3:::%s/*"]}]}`, accessKey, bucket, bucket))
	return accessKey, secretKey
}

// NewUser makes a user who may do nothing that a bucket's policy does not allow,
// and returns the credentials.
func (s *S3Server) NewUser(t testing.TB) (accessKey, secretKey string) {
	t.Helper()
	accessKey, secretKey = "reader"+rand.Text(), rand.Text()
	cmd := exec.CommandContext(t.Context(), s.binary, "admin",
		"--access", s.AccessKey, "--secret", s.SecretKey, "--endpoint-url", s.Endpoint,
		"create-user", "--access", accessKey, "--secret", secretKey, "--role", "user")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("create user: %v\n%s", err, out)
	}
	return accessKey, secretKey
}

// SetPolicy replaces the policy of a bucket.
func (s *S3Server) SetPolicy(t testing.TB, bucket, policy string) {
	t.Helper()
	if _, err := s.client().PutBucketPolicy(t.Context(), &s3.PutBucketPolicyInput{Bucket: &bucket, Policy: &policy}); err != nil {
		t.Fatalf("set bucket policy: %v", err)
	}
}

// SetVersioned makes a bucket keep what is replaced and deleted. The server was
// started with --versioning-dir.
func (s *S3Server) SetVersioned(t testing.TB, bucket string) {
	t.Helper()
	on := &types.VersioningConfiguration{Status: types.BucketVersioningStatusEnabled}
	if _, err := s.client().PutBucketVersioning(t.Context(), &s3.PutBucketVersioningInput{Bucket: &bucket, VersioningConfiguration: on}); err != nil {
		t.Fatalf("make bucket versioned: %v", err)
	}
}

// May tells what a user may do with an object: read it, if it is there, write it,
// remove it. It tries.
func (s *S3Server) May(t testing.TB, bucket, prefix, key, accessKey, secretKey string) (read, write, remove bool) {
	t.Helper()
	store := s.StoreFor(t, bucket, prefix, accessKey, secretKey)
	allowed := func(err error) bool {
		if err != nil && !errors.Is(err, blockstore.ErrDenied) {
			t.Errorf("try %s: %v", key, err)
		}
		return err == nil
	}
	_, _, err := store.Get(t.Context(), key, blockstore.MaxObjectSize)
	read = allowed(err)
	_, err = store.Put(t.Context(), key, []byte("overwritten"), blockstore.Condition{})
	return read, allowed(err), allowed(store.Delete(t.Context(), key))
}

// client returns the root user's client. It keeps no connection open.
func (s *S3Server) client() *s3.Client {
	return s3.New(s3.Options{
		BaseEndpoint: &s.Endpoint,
		UsePathStyle: true,
		Region:       "us-east-1",
		Credentials:  credentials.NewStaticCredentialsProvider(s.AccessKey, s.SecretKey, ""),
		HTTPClient:   &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: startTimeout},
		Retryer:      aws.NopRetryer{},
	})
}

// start starts the process and waits until it answers as this server.
func (s *S3Server) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	log, err := os.OpenFile(s.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() // the process has its own
	args := []string{"--port", strings.TrimPrefix(s.Endpoint, "http://"), "--keep-alive", "--quiet", "--iam-dir", s.iamDir, "posix"}
	cmd := exec.Command(s.binary, append(append(args, s.flags...), s.Dir)...)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+s.AccessKey, "ROOT_SECRET_ACCESS_KEY="+s.SecretKey)
	cmd.Stdout, cmd.Stderr = log, log
	p, err := startProcess(cmd)
	if err != nil {
		return err
	}
	for {
		_, err := s.client().ListBuckets(ctx, &s3.ListBucketsInput{})
		if err == nil {
			s.process = p
			return nil
		}
		select {
		case <-p.ended:
			text, _ := os.ReadFile(s.log)
			return fmt.Errorf("it ended at once: %w\n%s", p.err, bytes.TrimSpace(text))
		case <-ctx.Done():
			p.kill()
			return fmt.Errorf("it does not answer: %w", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
