package crypt

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go/logging"
)

const (
	// lineageContext is the name in the encryption context, which CloudTrail logs
	// and key policies may ask for.
	lineageContext = "lazyvol:lineage"

	kmsDialTimeout = 5 * time.Second
	kmsFirstWait   = 50 * time.Millisecond // before a request is tried again; doubles
	kmsMaxWait     = 4 * time.Second
	kmsMaxResponse = 64 << 10 // bytes; what KMS sends has below 10 KiB
)

func (k *Keys) generateByKMS(ctx context.Context, u keyURI, lineage string) (plain, wrapped []byte, canonical string, err error) {
	var out *kms.GenerateDataKeyOutput
	err = k.call(ctx, u.server, func(ctx context.Context, client *kms.Client) (err error) {
		out, err = client.GenerateDataKey(ctx, &kms.GenerateDataKeyInput{
			KeyId:             &u.kmsKey,
			KeySpec:           types.DataKeySpecAes256,
			EncryptionContext: map[string]string{lineageContext: lineage},
		})
		return err
	})
	if err != nil {
		return nil, nil, "", err
	}
	wrapped = encodeKMSWrapped(out.CiphertextBlob)
	if _, err = decodeKMSWrapped(wrapped); err == nil {
		err = checkDataKey(out.Plaintext)
	}
	if err == nil {
		u.kmsKey = aws.ToString(out.KeyId)
		canonical = u.String()
		err = ValidateURI(canonical)
	}
	if err != nil {
		clear(out.Plaintext)
		return nil, nil, "", fmt.Errorf("the answer of AWS KMS makes no sense: %w", err)
	}
	return out.Plaintext, wrapped, canonical, nil
}

func (k *Keys) unwrapByKMS(ctx context.Context, u keyURI, wrapped []byte, lineage string) ([]byte, error) {
	blob, err := decodeKMSWrapped(wrapped)
	if err != nil {
		return nil, err
	}
	var out *kms.DecryptOutput
	decrypt := func(ctx context.Context, client *kms.Client) (err error) {
		out, err = client.Decrypt(ctx, &kms.DecryptInput{
			CiphertextBlob:    blob,
			KeyId:             &u.kmsKey, // else KMS would use any key that fits
			EncryptionContext: map[string]string{lineageContext: lineage},
		})
		return err
	}
	err = k.call(ctx, u.server, decrypt)
	if missing := (config.SharedConfigProfileNotExistError{}); errors.As(err, &missing) {
		// The profile is one of the host that the lineage was made on; this one has
		// credentials of its own. They decide who may ask, not what comes back.
		u.server.profile = ""
		err = k.call(ctx, u.server, decrypt)
	}
	if err != nil {
		return nil, err
	}
	if err := checkDataKey(out.Plaintext); err != nil {
		clear(out.Plaintext)
		return nil, fmt.Errorf("the answer of AWS KMS makes no sense: %w", err)
	}
	return out.Plaintext, nil
}

func checkDataKey(plain []byte) error {
	if len(plain) != KeyLen {
		return fmt.Errorf("a data key of %d bytes instead of %d", len(plain), KeyLen)
	}
	return nil
}

// call makes a request, and makes it again while there is no answer or it is
// throttled. This is the only place that does: the SDK's retries are off.
func (k *Keys) call(ctx context.Context, server kmsServer, request func(context.Context, *kms.Client) error) error {
	total, cancel := context.WithTimeout(ctx, k.total)
	defer cancel()
	var failed error
	for wait, tries := kmsFirstWait, 1; ; wait, tries = min(2*wait, kmsMaxWait), tries+1 {
		err := k.once(total, server, request)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil && !errors.Is(err, ErrKeyUnavailable) {
			return err
		}
		if failed == nil || total.Err() == nil { // one that is cut short tells less than an answer before it
			failed = err
		}
		select {
		case <-total.Done():
			if ctx.Err() != nil {
				return fmt.Errorf("%w: %v", context.Cause(ctx), failed)
			}
			return fmt.Errorf("%w (tried %d times)", failed, tries)
		case <-time.After(wait/2 + rand.N(wait/2)): // jitter: hosts must not come back all at once
		}
	}
}

// once makes a request once.
func (k *Keys) once(ctx context.Context, server kmsServer, request func(context.Context, *kms.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, k.timeout)
	defer cancel()
	client, err := k.client(ctx, server)
	if err != nil {
		return kmsError(err)
	}
	credentials := client.Options().Credentials
	if credentials == nil {
		return fmt.Errorf("%w: no AWS credentials are configured", ErrKeyDenied)
	}
	if _, err := credentials.Retrieve(ctx); err != nil { // the SDK caches what it finds
		return credentialsError(err)
	}
	return kmsError(request(ctx, client))
}

// client returns the client for a server.
func (k *Keys) client(ctx context.Context, server kmsServer) (*kms.Client, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if client := k.clients[server]; client != nil {
		return client, nil
	}
	cfg, err := config.LoadDefaultConfig(ctx, server.loadOptions(k.timeout)...)
	if missing := (config.SharedConfigProfileNotExistError{}); errors.As(err, &missing) && server.profile != "" {
		return nil, fmt.Errorf("%w: %w", ErrKeyURI, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read the AWS configuration: %w", err)
	}
	client := kms.NewFromConfig(cfg, func(o *kms.Options) {
		if server.endpoint != "" {
			o.BaseEndpoint = &server.endpoint
		}
		if o.BaseEndpoint != nil { // from the environment or a file, perhaps
			o.Region = cmp.Or(o.Region, "us-east-1")
		}
		o.Retryer = aws.NopRetryer{}
		o.HTTPClient = boundedClient{o.HTTPClient}
	})
	if client.Options().Region == "" {
		return nil, fmt.Errorf("%w: no AWS region is known: give the key by its ARN, or add ?region=, or set AWS_REGION", ErrKeyURI)
	}
	k.clients[server] = client
	return client, nil
}

func (s kmsServer) loadOptions(timeout time.Duration) []func(*config.LoadOptions) error {
	// A BuildableClient, as LoadDefaultConfig cannot add AWS_CA_BUNDLE to any
	// other. Proxies are taken from the environment as usual.
	client := awshttp.NewBuildableClient().WithDialerOptions(func(d *net.Dialer) {
		d.Timeout = kmsDialTimeout
	}).WithTransportOptions(func(t *http.Transport) {
		t.TLSHandshakeTimeout = kmsDialTimeout
		t.ResponseHeaderTimeout = timeout
		t.DisableKeepAlives = true // there is one request, and then none for days
	})
	options := []func(*config.LoadOptions) error{
		config.WithHTTPClient(client),
		config.WithLogger(logging.Nop{}), // what matters comes back as an error
	}
	if s.region != "" {
		options = append(options, config.WithRegion(s.region))
	}
	if s.profile != "" {
		options = append(options, config.WithSharedConfigProfile(s.profile))
	}
	return options
}

// boundedClient ends responses that are longer than any of KMS.
type boundedClient struct{ kms.HTTPClient }

func (c boundedClient) Do(r *http.Request) (*http.Response, error) {
	response, err := c.HTTPClient.Do(r)
	if err != nil {
		return nil, err
	}
	response.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(response.Body, kmsMaxResponse), response.Body}
	return response, nil
}
