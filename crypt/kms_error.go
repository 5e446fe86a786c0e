package crypt

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"

	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"
)

// kmsError adds the sentinel that a failed request to KMS means. The caller looks
// at the end of its own context first.
func kmsError(err error) error {
	if err == nil {
		return nil
	}
	var (
		status int
		code   string
	)
	if response := (*awshttp.ResponseError)(nil); errors.As(err, &response) {
		status = response.HTTPStatusCode()
	}
	if api := smithy.APIError(nil); errors.As(err, &api) {
		code = api.ErrorCode()
	}
	switch kind := kmsSentinel(code, status); {
	case kind != nil:
		return fmt.Errorf("%w: %w", kind, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		// The limit on one request. %v, as it is not the caller's context that ended.
		return fmt.Errorf("%w in time: %v", ErrKeyUnavailable, err)
	case brokeOff(err), status/100 == 2: // the latter: a response that turned to garbage
		return fmt.Errorf("%w: %w", ErrKeyUnavailable, err)
	}
	return err
}

// kmsSentinel returns what a response's error code and status mean, or nil; a zero
// status is none. Codes go first: nearly all of them come with the status 400. See
// https://docs.aws.amazon.com/kms/latest/APIReference/API_Decrypt.html and
// https://docs.aws.amazon.com/kms/latest/APIReference/CommonErrors.html.
func kmsSentinel(code string, status int) error {
	switch code {
	case "NotFoundException":
		return ErrKeyNotFound
	case "DisabledException", "KMSInvalidStateException": // the latter: to be deleted, above all
		return ErrKeyDisabled
	case "InvalidCiphertextException", "IncorrectKeyException":
		return ErrWrongKey
	case "InvalidKeyUsageException", "InvalidArnException", "UnsupportedOperationException":
		return ErrKeyURI // it names an asymmetric key, for instance
	case "AccessDeniedException", "AccessDenied", "NotAuthorized", "OptInRequired",
		"UnrecognizedClientException", "InvalidClientTokenId", "InvalidSignatureException", "SignatureDoesNotMatch",
		"IncompleteSignature", "MissingAuthenticationToken", "MissingAuthenticationTokenException",
		"ExpiredTokenException", "ExpiredToken", "RequestExpired", "RequestTimeTooSkewed":
		return ErrKeyDenied
	case "ThrottlingException", "Throttling", "RequestLimitExceeded", "TooManyRequestsException", "LimitExceededException",
		"KMSInternalException", "DependencyTimeoutException", "KeyUnavailableException",
		"InternalFailure", "ServiceUnavailable", "ServiceUnavailableException", "RequestTimeout":
		return ErrKeyUnavailable
	}
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden:
		return ErrKeyDenied
	case http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusBadGateway,
		http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return ErrKeyUnavailable
	}
	return nil
}

// credentialsError is kmsError for the search of credentials. A host that has none
// ends up asking EC2's metadata service, which answers on EC2 only: that it does
// not is no outage.
func credentialsError(err error) error {
	var op *smithy.OperationError
	if errors.As(err, &op) && op.Service() != "ec2imds" {
		if classed := kmsError(err); errors.Is(classed, ErrKeyUnavailable) {
			return classed
		}
	}
	return fmt.Errorf("%w: no AWS credentials: %v", ErrKeyDenied, err)
}

// brokeOff reports whether a request failed on the way: it got no connection, no
// response, or half of one.
func brokeOff(err error) bool {
	var (
		certificate *tls.CertificateVerificationError
		send        *smithyhttp.RequestSendError
		connection  *net.OpError
	)
	if errors.As(err, &certificate) {
		return false // asking again will not change it
	}
	return errors.As(err, &send) || errors.As(err, &connection) || errors.Is(err, io.ErrUnexpectedEOF)
}
