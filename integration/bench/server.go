package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// The buckets, and where in them things lie.
const (
	storeBucket  = "lazyvol"
	storePrefix  = "bench"
	rawBucket    = "raw"
	rawKey       = "disk.img"
	blocksBucket = "s3backer"
)

// A server is an S3 server, with latency.
type server struct {
	dir       string // buckets are folders in it, objects files
	accessKey string
	secretKey string

	direct string // its URL without latency
	far    string // its URL through the tap and toxiproxy
	tap    *tap
	pids   []int // of the server, the proxy and the tap
}

// startServer starts versitygw, toxiproxy before it and the tap before that,
// and makes the buckets: anybody may read in them, so that bare clients need
// not sign.
func (b *bench) startServer(ctx context.Context) (*server, error) {
	versitygw, err := b.tool("versitygw")
	if err != nil {
		return nil, err
	}
	s := &server{dir: filepath.Join(b.dir, "buckets"), accessKey: "bench" + rand.Text(), secretKey: rand.Text()}
	if err := os.Mkdir(s.dir, 0o755); err != nil {
		return nil, err
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	s.direct = "http://" + address
	p, err := startProcess(b.dir, "versitygw", []string{"ROOT_ACCESS_KEY=" + s.accessKey, "ROOT_SECRET_KEY=" + s.secretKey},
		versitygw, "--port", address, "--keep-alive", "--quiet", "posix", s.dir)
	if err != nil {
		return nil, err
	}
	b.later(p.stop)
	s.pids = []int{os.Getpid(), p.cmd.Process.Pid}
	if err := p.await(ctx, "versitygw answers", func() bool { return answers(s.direct) }); err != nil {
		return nil, err
	}
	upstream, pid, err := b.startToxiproxy(ctx, address)
	if err != nil {
		return nil, err
	}
	s.pids = append(s.pids, pid)
	if s.tap, err = startTap(upstream); err != nil {
		return nil, err
	}
	b.later(s.tap.stop)
	s.far = s.tap.url()
	for _, bucket := range []string{storeBucket, rawBucket, blocksBucket} {
		if err := s.makeBucket(ctx, bucket); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// startToxiproxy starts a proxy that holds back every response, and returns its
// address and process id.
func (b *bench) startToxiproxy(ctx context.Context, upstream string) (address string, pid int, err error) {
	binary, err := b.tool("toxiproxy-server")
	if err != nil {
		return "", 0, err
	}
	control, err := freeAddress()
	if err != nil {
		return "", 0, err
	}
	host, port, err := net.SplitHostPort(control)
	if err != nil {
		return "", 0, err
	}
	p, err := startProcess(b.dir, "toxiproxy", nil, binary, "-host", host, "-port", port)
	if err != nil {
		return "", 0, err
	}
	b.later(p.stop)
	if err := p.await(ctx, "toxiproxy answers", func() bool { return answers("http://" + control + "/version") }); err != nil {
		return "", 0, err
	}
	var proxy struct{ Listen string }
	err = post(ctx, "http://"+control+"/proxies", map[string]any{"name": "s3", "listen": "127.0.0.1:0", "upstream": upstream, "enabled": true}, &proxy)
	if err != nil {
		return "", 0, err
	}
	toxic := map[string]any{"type": "latency", "stream": "downstream", "attributes": map[string]any{"latency": b.latency.Milliseconds()}}
	return proxy.Listen, p.cmd.Process.Pid, post(ctx, "http://"+control+"/proxies/s3/toxics", toxic, nil)
}

// post posts JSON, and decodes what comes back unless reply is nil.
func post(ctx context.Context, url string, body, reply any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(data))
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	said, err := io.ReadAll(response.Body)
	switch {
	case err != nil:
		return err
	case response.StatusCode/100 != 2:
		return fmt.Errorf("%s: %s: %s", url, response.Status, tail(said))
	case reply == nil:
		return nil
	}
	return json.Unmarshal(said, reply)
}

// freeAddress returns an address that nobody listens on for now.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// answers reports whether an HTTP server says anything.
func answers(url string) bool {
	client := http.Client{Timeout: time.Second}
	response, err := client.Get(url)
	if err != nil {
		return false
	}
	return response.Body.Close() == nil
}

// client returns a client of the server without latency.
func (s *server) client() *s3.Client {
	return s3.New(s3.Options{
		BaseEndpoint: &s.direct, UsePathStyle: true, Region: "us-east-1", Retryer: aws.NopRetryer{},
		Credentials: credentials.NewStaticCredentialsProvider(s.accessKey, s.secretKey, ""),
	})
}

func (s *server) makeBucket(ctx context.Context, name string) error {
	if _, err := s.client().CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &name}); err != nil {
		return fmt.Errorf("make bucket %s: %w", name, err)
	}
	policy := fmt.Sprintf(`{"Version": "2012-10-17", "Statement": [{
		"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject"], "Resource": ["arn:aws:s3:::%s/*"]}]}`, name)
	if _, err := s.client().PutBucketPolicy(ctx, &s3.PutBucketPolicyInput{Bucket: &name, Policy: &policy}); err != nil {
		return fmt.Errorf("let anybody read bucket %s: %w", name, err)
	}
	return nil
}

// upload puts a file into a bucket, without latency.
func (s *server) upload(ctx context.Context, bucket, object, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := s.client().PutObject(ctx, &s3.PutObjectInput{Bucket: &bucket, Key: &object, Body: f}); err != nil {
		return fmt.Errorf("upload %s: %w", path, err)
	}
	return nil
}

// folder returns where the objects of lazyvol's store below a prefix are files.
func (s *server) folder(prefix string) string { return filepath.Join(s.dir, storeBucket, prefix) }

// env makes this server the AWS of a child process, whatever else its
// environment says.
func (s *server) env(endpoint string) []string {
	return []string{
		"AWS_ENDPOINT_URL=" + endpoint, "AWS_ENDPOINT_URL_S3=" + endpoint,
		"AWS_ACCESS_KEY_ID=" + s.accessKey, "AWS_SECRET_ACCESS_KEY=" + s.secretKey, "AWS_SESSION_TOKEN=",
		"AWS_REGION=us-east-1", "AWS_PROFILE=", "AWS_CONFIG_FILE=/dev/null", "AWS_SHARED_CREDENTIALS_FILE=/dev/null",
		"AWS_EC2_METADATA_DISABLED=true",
	}
}
