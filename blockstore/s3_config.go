package blockstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/smithy-go/logging"
)

const (
	s3Timeout     = 15 * time.Second // S3's own p99.9 to the first byte is below 1 s
	s3MinRate     = 128 << 10        // bytes a second; a slower transfer counts as hung
	s3Connections = 128
	s3DialTimeout = 5 * time.Second

	// s3AskFirst is how many bytes a body has before the server is asked whether it
	// wants it at all (Expect: 100-continue), which takes a round trip. The SDK's
	// own 2 MiB take less than that to send.
	s3AskFirst = 8 << 20
)

// S3Config says which bucket a store is in and how to reach it. Zero fields
// other than Bucket mean what the AWS environment and configuration files say,
// or the default given.
type S3Config struct {
	Bucket string
	Prefix string // a key, as CheckKey has it; "" is the whole bucket

	Region   string // with a custom endpoint, us-east-1 if nothing else names one
	Endpoint string // http or https URL of a server that is not AWS
	Profile  string // in the AWS configuration files

	// Credentials replace those of the environment.
	Credentials aws.CredentialsProvider

	// Timeout bounds one request, besides the time that its data takes at
	// 128 KiB a second; 15 s.
	Timeout time.Duration

	// Connections bounds the connections to the server, and so the requests
	// under way: more of them wait; 128.
	Connections int
}

// NewS3 returns the store in a bucket of AWS S3 or of a server that speaks its
// protocol. It reads the AWS environment variables (AWS_ENDPOINT_URL and
// AWS_ENDPOINT_URL_S3 included) and configuration files, and fetches
// credentials, but does not ask whether the bucket exists. Servers other than
// AWS are addressed in path style.
func NewS3(ctx context.Context, c S3Config) (Store, error) {
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("store in bucket %q: %w", c.Bucket, err)
	}
	s, err := newS3(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", c.url(), err)
	}
	return s, nil
}

func (c S3Config) check() error {
	if c.Bucket == "" {
		return errors.New("no bucket is named")
	}
	if c.Prefix != "" {
		if err := CheckKey(c.Prefix); err != nil {
			return fmt.Errorf("prefix: %w", err)
		}
	}
	if c.Endpoint != "" {
		return checkEndpoint(c.Endpoint)
	}
	return nil
}

func newS3(ctx context.Context, c S3Config) (*s3Store, error) {
	timeout := cmp.Or(c.Timeout, s3Timeout)
	cfg, err := config.LoadDefaultConfig(ctx, c.loadOptions(timeout)...)
	if err != nil {
		return nil, err
	}
	client := s3.NewFromConfig(cfg, func(o *s3.Options) {
		if c.Endpoint != "" {
			o.BaseEndpoint = &c.Endpoint
		}
		if o.BaseEndpoint != nil { // from the environment or a file, perhaps
			o.UsePathStyle = true // bucket.host has neither a name in DNS nor a certificate there
			o.Region = cmp.Or(o.Region, "us-east-1")
		}
		o.Retryer = aws.NopRetryer{} // Retry is the one place that retries
		o.ContinueHeaderThresholdBytes = s3AskFirst
	})
	if client.Options().Region == "" {
		return nil, errors.New("no AWS region is known: set AWS_REGION, a region in the AWS profile, or ?region= in the store's URL")
	}
	if cfg.Credentials == nil {
		return nil, fmt.Errorf("%w: no AWS credentials are configured", ErrDenied)
	}
	if _, err := cfg.Credentials.Retrieve(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("%w: no AWS credentials: %w", ErrDenied, err)
	}
	s := &s3Store{client: client, bucket: c.Bucket, url: c.url(), timeout: timeout}
	if c.Prefix != "" {
		s.prefix = c.Prefix + "/"
	}
	return s, nil
}

func (c S3Config) loadOptions(timeout time.Duration) []func(*config.LoadOptions) error {
	connections := cmp.Or(c.Connections, s3Connections)
	// A BuildableClient, as LoadDefaultConfig cannot add AWS_CA_BUNDLE to any
	// other. Proxies are taken from the environment as usual.
	client := awshttp.NewBuildableClient().WithDialerOptions(func(d *net.Dialer) {
		d.Timeout = s3DialTimeout
	}).WithTransportOptions(func(t *http.Transport) {
		t.MaxConnsPerHost = connections
		t.MaxIdleConnsPerHost = connections
		t.MaxIdleConns = 0 // bounded per host
		t.TLSHandshakeTimeout = s3DialTimeout
		t.ResponseHeaderTimeout = timeout
		t.DisableCompression = true // our bytes are what the store holds
		// Not HTTP/2, which puts all requests on one TCP connection, where a
		// lost packet stalls all of them and one congestion window is all
		// there is.
		t.ForceAttemptHTTP2 = false
		t.Protocols = new(http.Protocols)
		t.Protocols.SetHTTP1(true)
	})
	options := []func(*config.LoadOptions) error{
		config.WithHTTPClient(client),
		config.WithLogger(logging.Nop{}), // what matters comes back as an error
		// The SDK would add CRC32 trailers to every Put, and ask for checksums
		// with every Get; a number of stores refuse the one or get the other
		// wrong for ranges (aws/aws-sdk-go-v2 issue 3007). Signed payloads
		// (http) and TLS (https) cover the way there, and our own SHA-256 and
		// CRC32C, checked on every read, all of it.
		config.WithRequestChecksumCalculation(aws.RequestChecksumCalculationWhenRequired),
		config.WithResponseChecksumValidation(aws.ResponseChecksumValidationWhenRequired),
	}
	if c.Region != "" {
		options = append(options, config.WithRegion(c.Region))
	}
	if c.Profile != "" {
		options = append(options, config.WithSharedConfigProfile(c.Profile))
	}
	if c.Credentials != nil {
		options = append(options, config.WithCredentialsProvider(c.Credentials))
	}
	return options
}

// url returns the URL that Open takes.
func (c S3Config) url() string {
	u := url.URL{Scheme: "s3", Host: c.Bucket, Path: c.Prefix}
	query := url.Values{}
	for name, value := range map[string]string{"region": c.Region, "endpoint": c.Endpoint, "profile": c.Profile} {
		if value != "" {
			query.Set(name, value)
		}
	}
	u.RawQuery = query.Encode()
	return u.String()
}

func checkEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	switch {
	case err != nil:
		return fmt.Errorf("endpoint: %w", err)
	case u.User != nil:
		return errors.New("endpoint: credentials do not belong in it")
	case u.Scheme != "http" && u.Scheme != "https", u.Host == "":
		return fmt.Errorf("endpoint %q: want http://host:port or https://host", endpoint)
	}
	return nil
}
